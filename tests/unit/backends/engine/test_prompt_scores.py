"""Log-probabilities of a prompt's own tokens: right, bounded, once each, and only where wanted."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import EngineOptions
from backends.echo import EchoBackend, echo_info
from backends.engine import prompt_scores
from backends.engine.prompt_scores import PromptScores
from backends.engine.row_model import RowInput
from backends.engine.trial.row_models import LimitedRows
from backends.stepper import SequenceSpec
from backends.trials import TrialResult
from core.errors import NonFiniteOutput, RequestError
from core.types import PrefillProgress, SamplingParams, TextDelta, TokenLogprob
from tests.requests import end_of, request, run, text_of
from tests.unit.backends.engine.rows.test_row_stepper import (
    VOCABULARY,
    FakeModel,
    Run,
    expected,
    next_token,
    prompt_of,
    stepper,
)


def logits_after(history: Sequence[int]) -> NDArray[np.float32]:
    seed = sum((place + 1) * token for place, token in enumerate(history))
    logits = np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32)
    logits[next_token(history)] = 9.0
    return logits


class RandomModel(FakeModel):
    """Gives other logits for each history; those after `bad_at` tokens are NaN."""

    bad_at = -1

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        logits = super().extend(rows)
        for index, row in enumerate(rows):
            logits[index] = self._after(self.rows[row.row])
        return logits

    def _after(self, history: Sequence[int]) -> NDArray[np.float32]:
        bad = len(history) == self.bad_at
        return np.full(VOCABULARY, np.nan, np.float32) if bad else logits_after(history)


class WholeModel(RandomModel):
    """Also gives the logits of all tokens."""

    def __init__(self, max_rows: int) -> None:
        super().__init__(max_rows)
        self.pieces: list[int] = []

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        self.pieces.append(len(row.tokens))
        held = self.rows[row.row]
        found = []
        for token in row.tokens:
            held.append(token)
            found.append(self._after(held))
        return np.stack(found)


class ScoredRun(Run):
    """Also collects the prompts' log-probabilities, and what failed."""

    def __init__(self, model: FakeModel, **options: int) -> None:
        super().__init__(stepper(model, **options))
        self.scores: dict[int, list[TokenLogprob]] = {}
        self.problems: dict[int, Exception] = {}

    def score(self, number: int, prompt: Sequence[int], top: int = 2, max_tokens: int = 1) -> None:
        self.tokens[number], self.limits[number] = [], max_tokens
        sampling = SamplingParams(temperature=0.0, prompt_logprobs=top)
        self.stepper.add(SequenceSpec(number, tuple(prompt), sampling, max_tokens))

    def finish(self) -> None:
        for _ in range(3000):
            if not self.limits:
                return
            for output in self.step():
                found = self.scores.setdefault(output.sequence_id, [])
                found += output.prompt_logprobs
                if output.problem is not None:
                    self.problems[output.sequence_id] = output.problem
                    self.limits.pop(output.sequence_id)
        raise AssertionError("sequences never ended")


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    found: NDArray[np.float64] = values - np.log(np.exp(values).sum())
    return found


def check(prompt: Sequence[int], scores: Sequence[TokenLogprob], top: int = 2) -> None:
    assert [score.token_id for score in scores] == list(prompt)
    assert math.isnan(scores[0].logprob)
    assert scores[0].top == ()
    for place, score in enumerate(scores[1:], 1):
        right = log_softmax(logits_after(prompt[:place]))
        assert score.logprob == pytest.approx(right[prompt[place]], abs=1e-5)
        likeliest = np.argsort(-right)[:top]
        assert [each.token_id for each in score.top] == likeliest.tolist()
        assert [each.logprob for each in score.top] == pytest.approx(right[likeliest], abs=1e-5)


@pytest.mark.parametrize("kind", [RandomModel, WholeModel])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_each_token_has_the_probability_that_the_model_gives_it(
    kind: type[FakeModel], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_scores, "_MOST_LOGITS", 20 * VOCABULARY)
    model = kind(4)
    run = ScoredRun(model)
    run.score(1, prompt_of(length), max_tokens=3)
    run.finish()
    check(prompt_of(length), run.scores[1])
    assert run.tokens[1] == expected(prompt_of(length), 3)
    if isinstance(model, WholeModel):
        assert max(model.pieces, default=0) <= 20


@pytest.mark.parametrize("kind", [RandomModel, WholeModel])
def test_the_logits_are_shown_to_those_who_ask(kind: type[FakeModel]) -> None:
    run, prompt = ScoredRun(kind(4)), prompt_of(150)
    shown: list[tuple[int, NDArray[np.float32]]] = []
    run.tokens[1], run.limits[1] = [], 1
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
    asked = SequenceSpec(1, tuple(prompt), sampling, 1)
    run.stepper.add(replace(asked, on_logits=lambda place, row: shown.append((place, row.copy()))))
    run.finish()
    assert [place for place, _ in shown] == list(range(149))
    for place, row in shown:
        assert np.array_equal(row, logits_after(prompt[: place + 1]))


def test_a_computed_prefix_is_not_reused_for_scores_but_for_others() -> None:
    run = ScoredRun(WholeModel(4))
    run.add(1, prompt_of(60))
    run.finish()
    run.score(2, prompt_of(60))
    run.finish()
    check(prompt_of(60), run.scores[2])
    assert run.cached[2] == 0
    run.add(3, prompt_of(60))
    run.finish()
    assert run.cached[3] == 59
    assert run.scores[3] == []


def test_scored_and_other_rows_run_together_and_preempted_ones_are_scored_once() -> None:
    run = ScoredRun(WholeModel(4), kv_tokens=220)
    for number in (1, 2, 3):
        run.score(number, prompt_of(70, number), max_tokens=30)
    run.add(4, prompt_of(40, 4), max_tokens=30)
    run.finish()
    assert run.stepper.counters().preemptions
    for number in (1, 2, 3):
        check(prompt_of(70, number), run.scores[number])
        assert run.tokens[number] == expected(prompt_of(70, number), 30)
    assert run.tokens[4] == expected(prompt_of(40, 4), 30)


def test_logits_that_are_not_finite_fail_their_own_request() -> None:
    model = WholeModel(4)
    model.bad_at = 30
    run = ScoredRun(model)
    run.score(1, prompt_of(50))
    run.add(2, prompt_of(20), max_tokens=4)
    run.finish()
    assert isinstance(run.problems[1], NonFiniteOutput)
    assert run.tokens[2] == expected(prompt_of(20), 4)


def test_nothing_is_computed_otherwise_where_no_scores_are_wanted() -> None:
    model = WholeModel(4)
    run = ScoredRun(model)
    run.add(1, prompt_of(100))
    run.finish()
    assert model.pieces == []
    assert run.scores[1] == []


def test_a_model_without_pieces_is_scored_token_by_token() -> None:
    model = WholeModel(4)
    rows = LimitedRows(model, TrialResult(has_chunks=False))
    row = rows.open_row(10)
    tokens = prompt_of(6)
    found = [rows.extend_all(RowInput(row, tokens[:2])), rows.extend_all(RowInput(row, tokens[2:]))]
    wanted = [logits_after(tokens[: place + 1]) for place in range(6)]
    np.testing.assert_array_equal(np.concatenate(found), np.stack(wanted))
    assert model.pieces == [2, 1, 1, 1, 1]


def test_positions_that_are_computed_again_are_given_once() -> None:
    sampling = SamplingParams(prompt_logprobs=0)
    scores = PromptScores.of(SequenceSpec(1, (5, 6, 7), sampling, 1), lambda token: bytes((token,)))
    assert scores is not None
    scores.add(0, logits_after([5]))
    assert [token.token_id for token in scores.take()] == [5, 6]
    scores.add_piece(0, [logits_after([5]), logits_after([5, 6]), logits_after([5, 6, 7])])
    assert [token.token_id for token in scores.take()] == [7]
    assert scores.is_complete
    assert scores.take() == ()


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_engine_gives_the_scores_before_the_echoed_prompt(max_tokens: int) -> None:
    engine = EchoBackend().open(echo_info(), EngineOptions(max_sequences=2))
    try:
        wanted = request(
            "hello", max_tokens=max_tokens, echo_prompt=True, top_logprobs=0, prompt_logprobs=1
        )
        events = await run(engine, wanted)
        (progress,) = [event for event in events if isinstance(event, PrefillProgress)]
        assert b"".join(token.data for token in progress.logprobs) == b"hello"
        assert events[1] == TextDelta("hello")
        assert text_of(events) == "hello" + "hello"[:max_tokens]
        assert end_of(events).usage.completion_tokens == max_tokens
        assert end_of(events).reason == "length"
        resumed = replace(wanted, id="resumed", generated=(ord("h"),), echo_prompt=False)
        again = await run(engine, resumed)
        assert not any(isinstance(event, PrefillProgress) and event.logprobs for event in again)
    finally:
        await engine.close()


async def test_an_end_token_is_listed_after_an_echoed_prompt() -> None:
    engine = EchoBackend().open(echo_info(), EngineOptions(max_sequences=2))
    try:
        wanted = request("h", max_tokens=2, echo_prompt=True, top_logprobs=0, prompt_logprobs=0)
        events = await run(engine, wanted)
        listed = [e for event in events if isinstance(event, TextDelta) for e in event.logprobs]
        assert [(token.token_id, token.data) for token in listed] == [(104, b"h"), (256, b"")]
        assert (text_of(events), end_of(events).usage.completion_tokens) == ("hh", 2)
    finally:
        await engine.close()


async def test_more_scores_than_one_answer_holds_are_refused() -> None:
    engine = EchoBackend().open(echo_info(), EngineOptions(max_sequences=2))
    try:
        with pytest.raises(RequestError, match="131072") as caught:
            await run(engine, request("x" * 7000, max_tokens=1, prompt_logprobs=20))
        assert caught.value.param == "prompt"
    finally:
        await engine.close()
