"""Continuous batching over rows: what is computed, shared, preempted and recomputed."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.base import EngineOptions
from backends.engine.row_model import RowInput
from backends.engine.row_stepper import RowStepper
from backends.stepper import SequenceSpec, StepOutput
from core.errors import RequestError, RequestFailed
from core.types import SamplingParams

VOCABULARY = 97
END = 96


def next_token(history: Sequence[int]) -> int:
    """The token that the fake model finds likeliest after `history`; never the end token."""
    return (sum((i % 7 + 1) * token for i, token in enumerate(history)) * 31 + 5) % END


class FakeModel:
    """Rows that know their whole history, so that a wrong cache gives a wrong token."""

    vocabulary_size = VOCABULARY

    def __init__(self, max_rows: int, *, can_cut: bool = True, can_copy: bool = True) -> None:
        self.max_rows = max_rows
        self.native_cpu_s = 0.0
        self.rows: dict[int, list[int]] = {}
        self.computed = 0
        self.calls: list[list[int]] = []
        self.most_held = 0
        self._can_cut, self._can_copy = can_cut, can_copy
        self._next = 0
        self.is_closed = False

    def open_row(self, capacity: int) -> int:
        assert capacity > 0
        assert len(self.rows) < self.max_rows
        self._next += 1
        self.rows[self._next] = []
        return self._next

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        logits = np.zeros((len(rows), VOCABULARY), np.float32)
        self.calls.append([len(row.tokens) for row in rows])
        for index, row in enumerate(rows):
            assert len(row.tokens) > 0
            self.rows[row.row].extend(row.tokens)
            self.computed += len(row.tokens)
            logits[index, next_token(self.rows[row.row])] = 1.0
        self.most_held = max(self.most_held, sum(map(len, self.rows.values())))
        return logits

    def truncate(self, row: int, length: int) -> bool:
        if self._can_cut:
            del self.rows[row][length:]
        return self._can_cut

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        if not self._can_copy:
            return None
        row = self.open_row(capacity)
        assert length <= len(self.rows[source])
        self.rows[row] = self.rows[source][:length]
        return row

    def close_row(self, row: int) -> None:
        del self.rows[row]

    def close(self) -> None:
        self.is_closed = True


class Pieces:
    def is_end(self, token_id: int) -> bool:
        return token_id == END

    def piece(self, token_id: int, *, special: bool) -> bytes:
        del special
        return bytes((token_id,))


def stepper(model: FakeModel, *, kv_tokens: int = 4096, sequences: int = 4) -> RowStepper:
    options = EngineOptions(
        max_sequences=sequences, prefill_chunk_tokens=64, kv_tokens=kv_tokens, context_tokens=1024
    )
    return RowStepper(model, Pieces(), options)


def spec(number: int, prompt: Sequence[int], max_tokens: int = 8) -> SequenceSpec:
    return SequenceSpec(number, tuple(prompt), SamplingParams(temperature=0.0), max_tokens)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history))
    return history[len(prompt) :]


class Run:
    """Drives a stepper and ends each sequence at its limit, as the engine does."""

    def __init__(self, chosen: RowStepper) -> None:
        self.stepper = chosen
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.limits: dict[int, int] = {}

    def add(
        self, number: int, prompt: Sequence[int], max_tokens: int = 8, *, reads_cache: bool = True
    ) -> None:
        self.tokens[number], self.limits[number] = [], max_tokens
        self.stepper.add(replace(spec(number, prompt, max_tokens), reads_cache=reads_cache))

    def step(self) -> list[StepOutput]:
        outputs = self.stepper.step()
        for output in outputs:
            if output.token_id is None:
                continue
            self.cached.setdefault(output.sequence_id, output.cached)
            self.tokens[output.sequence_id].append(output.token_id)
            if len(self.tokens[output.sequence_id]) >= self.limits[output.sequence_id]:
                self.stepper.remove(output.sequence_id)
                del self.limits[output.sequence_id]
        return outputs

    def finish(self) -> None:
        for _ in range(5000):
            if not self.limits:
                return
            self.step()
        raise AssertionError(f"{len(self.limits)} sequences never ended")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(token * 13 + seed * 17 + 3) % END for token in range(length)]


def test_a_sequence_gets_its_tokens_and_progress() -> None:
    run = Run(stepper(FakeModel(4)))
    run.add(1, prompt_of(150))
    progress = [run.step()[0] for _ in range(3)]
    assert [output.token_id is None for output in progress] == [True, True, False]
    assert [output.prefilled for output in progress] == [64, 128, 150]
    run.finish()
    assert run.tokens[1] == expected(prompt_of(150), 8)


@pytest.mark.parametrize(
    ("deterministic", "computed"),
    [(False, [64, 128, 160, 185, 200]), (True, [64, 128, 192, 200])],
)
def test_pieces_of_a_prompt_shrink_as_its_context_grows(
    deterministic: bool, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.engine.prefill._LARGEST_AREA", 64 * 64)
    monkeypatch.setattr("backends.engine.prefill._SMALLEST_CHUNK", 8)
    options = EngineOptions(
        max_sequences=1,
        prefill_chunk_tokens=64,
        kv_tokens=4096,
        context_tokens=1024,
        deterministic=deterministic,
    )
    run = Run(RowStepper(FakeModel(4), Pieces(), options))
    run.add(1, prompt_of(200))
    assert [run.step()[0].prefilled for _ in computed] == computed
    run.finish()
    assert run.tokens[1] == expected(prompt_of(200), 8)


def test_rows_decode_together_in_one_call() -> None:
    model = FakeModel(8)
    run = Run(stepper(model))
    for number in range(4):
        run.add(number, prompt_of(5, number))
    run.finish()
    assert [1, 1, 1, 1] in model.calls
    assert len(model.calls) == 8


def test_a_finished_prompt_is_continued_without_computing_it_again() -> None:
    model = FakeModel(4)
    run = Run(stepper(model))
    run.add(1, prompt_of(60))
    run.finish()
    turn = [*prompt_of(60), *run.tokens[1], *prompt_of(20, 5)]
    before = model.computed
    run.add(2, turn)
    run.finish()
    assert run.cached[2] == 67
    assert model.computed - before == len(turn) - 67 + 7
    assert run.tokens[2] == expected(turn, 8)


def test_a_prompt_that_reads_no_cache_is_computed_whole() -> None:
    model = FakeModel(4)
    run = Run(stepper(model))
    shared = prompt_of(200)
    run.add(1, shared)
    run.finish()
    before = model.computed
    run.add(2, [*shared, 1, 2], reads_cache=False)
    run.add(3, [*shared, 1, 2, 3], reads_cache=False)
    run.finish()
    assert run.cached == {1: 0, 2: 0, 3: 0}
    assert model.computed - before == 202 + 203 + 2 * 7
    assert run.tokens[2] == expected([*shared, 1, 2], 8)
    assert run.tokens[3] == expected([*shared, 1, 2, 3], 8)
    run.add(4, [*shared, 1, 2, 3, 4])
    run.finish()
    assert run.cached[4] == 203


def test_a_preempted_row_that_reads_no_cache_is_computed_whole_again() -> None:
    model = FakeModel(4)
    run = Run(stepper(model, kv_tokens=150))
    run.add(1, prompt_of(70), max_tokens=20)
    run.add(2, prompt_of(70), max_tokens=20, reads_cache=False)
    run.finish()
    assert run.stepper.counters().preemptions > 0
    assert run.cached == {1: 0, 2: 0}
    assert run.tokens[1] == run.tokens[2] == expected(prompt_of(70), 20)


def test_a_shared_beginning_is_copied_and_both_stay() -> None:
    model = FakeModel(6)
    run = Run(stepper(model))
    shared = prompt_of(80)
    run.add(1, [*shared, 1, 2, 3])
    run.finish()
    run.add(2, [*shared, 7, 8, 9])
    run.finish()
    run.add(3, [*shared, 1, 2, 3, 4])
    run.finish()
    assert run.cached == {1: 0, 2: 80, 3: 83}
    assert run.tokens[2] == expected([*shared, 7, 8, 9], 8)
    assert run.tokens[3] == expected([*shared, 1, 2, 3, 4], 8)


def test_a_row_waits_for_a_prefix_that_another_is_computing() -> None:
    model = FakeModel(8)
    run = Run(stepper(model))
    shared = prompt_of(200)
    for number in range(4):
        run.add(number, [*shared, number])
    run.finish()
    assert model.computed < 2 * 200
    for number in range(4):
        assert run.tokens[number] == expected([*shared, number], 8)


@pytest.mark.parametrize("can_cut", [True, False])
def test_without_copies_a_kept_row_is_cut_or_left(can_cut: bool) -> None:
    model = FakeModel(4, can_cut=can_cut, can_copy=False)
    run = Run(stepper(model))
    run.add(1, [*prompt_of(80), 1, 2])
    run.finish()
    run.add(2, [*prompt_of(80), 9])
    run.finish()
    assert run.cached[2] == (80 if can_cut else 0)
    assert run.tokens[2] == expected([*prompt_of(80), 9], 8)


def test_rows_that_do_not_fit_wait_and_lose_nothing() -> None:
    model = FakeModel(8)
    chosen = stepper(model, kv_tokens=150)
    run = Run(chosen)
    for number in range(4):
        run.add(number, prompt_of(40, number), max_tokens=60)
    run.finish()
    assert chosen.counters().preemptions > 0
    assert model.most_held <= 150
    for number in range(4):
        assert run.tokens[number] == expected(prompt_of(40, number), 60)


def test_kept_rows_give_way_to_running_ones() -> None:
    model = FakeModel(3)
    run = Run(stepper(model, kv_tokens=120, sequences=3))
    for number in range(9):
        run.add(number, prompt_of(50, number))
        run.finish()
    assert model.most_held <= 120
    assert len(model.rows) <= 3


def test_one_sequence_over_the_cache_is_an_error() -> None:
    run = Run(stepper(FakeModel(2), kv_tokens=50))
    run.add(1, prompt_of(60))
    problem = next(one.problem for one in run.step() if one.problem)
    assert isinstance(problem, RequestFailed)
    assert "50 tokens" in problem.message


def test_remove_frees_and_is_idempotent() -> None:
    model = FakeModel(4)
    chosen = stepper(model)
    chosen.add(spec(1, prompt_of(10)))
    chosen.add(spec(2, prompt_of(12)))
    chosen.remove(2)
    chosen.step()
    chosen.remove(1)
    chosen.remove(1)
    assert model.rows == {}
    assert chosen.step() == []
    assert chosen.counters().kv_used_tokens == 0


def test_a_wrong_request_is_refused_and_leaves_nothing() -> None:
    chosen = stepper(FakeModel(4))
    with pytest.raises(RequestError, match="vocabulary"):
        chosen.add(spec(1, [VOCABULARY]))
    chosen.remove(1)
    assert chosen.step() == []


def test_close_closes_the_model() -> None:
    model = FakeModel(2)
    stepper(model).close()
    assert model.is_closed


orders = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 90), st.integers(1, 30), st.integers(0, 6)),
    min_size=1,
    max_size=12,
)


@given(
    orders=orders,
    kv_tokens=st.integers(130, 400),
    can_cut=st.booleans(),
    can_copy=st.booleans(),
    max_rows=st.integers(2, 7),
)
@settings(max_examples=80, deadline=None)
def test_any_mix_of_requests_is_answered_as_if_alone(
    orders: list[tuple[int, int, int, int]],
    kv_tokens: int,
    can_cut: bool,
    can_copy: bool,
    max_rows: int,
) -> None:
    """Prompts from a few families share prefixes; they come at different steps."""
    model = FakeModel(max_rows, can_cut=can_cut, can_copy=can_copy)
    run = Run(stepper(model, kv_tokens=kv_tokens))
    prompts = {}
    for number, (family, length, tokens, steps) in enumerate(orders):
        prompts[number] = ([*prompt_of(length, family), number], tokens)
        run.add(number, *prompts[number])
        for _ in range(steps):
            if run.limits:
                run.step()
    run.finish()
    assert model.most_held <= kv_tokens
    for number, (prompt, tokens) in prompts.items():
        assert run.tokens[number] == expected(prompt, tokens)
