"""Tests of resumed answers: nothing is sent twice or lost, and all tokens are counted."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import EngineLoad
from backends.echo import END_TOKEN, ByteTokenizer, echo_info
from backends.engine.batching import BatchingEngine
from backends.engine.sampling import RowSampler
from backends.grammar.constraint import Constraint
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Prepared, Preparer
from backends.stepper import SequenceSpec, StepOutput
from core.errors import RequestError
from core.types import (
    GenerationEvent,
    JsonOutput,
    PrefillProgress,
    SamplingParams,
    TextDelta,
    TokenLogprob,
)
from tests.requests import end_of, request, run, text_of, token_ids_of

ANSWER = "Die Möwe 🎈 flog. ENE ENDING"


class ScriptStepper:
    """Answers every prompt with `ANSWER`, one byte a step after one step of prefill."""

    max_sequences = 4

    def __init__(self) -> None:
        self.specs: list[SequenceSpec] = []
        self._left: dict[int, list[int]] = {}

    def add(self, spec: SequenceSpec) -> None:
        self.specs.append(spec)
        script = [*ANSWER.encode(), END_TOKEN][spec.generated :]
        self._left[spec.id] = [-1, *script][::-1]

    def remove(self, sequence_id: int) -> None:
        self._left.pop(sequence_id, None)

    def step(self) -> list[StepOutput]:
        return [self._next(number, left) for number, left in self._left.items()]

    @staticmethod
    def _next(number: int, left: list[int]) -> StepOutput:
        token_id = left.pop()
        if token_id < 0:
            return StepOutput(number, None, prefilled=2, cached=9)
        logprob = TokenLogprob(token_id, bytes((token_id % 256,)), -1.0)
        return StepOutput(number, token_id, token_id == END_TOKEN, logprob, cached=9)

    def counters(self) -> EngineLoad:
        return EngineLoad()

    def close(self) -> None:
        self._left.clear()


def preparer(tokenizer: ByteTokenizer | None = None, context_tokens: int = 256) -> Preparer:
    return Preparer(
        echo_info(),
        tokenizer or ByteTokenizer(),
        ChatFormat(None, "", ""),
        context_tokens=context_tokens,
    )


def continued(generated: Sequence[int], **options: Any) -> Prepared:
    wanted = request("hello", max_tokens=10, **options)
    return preparer().prepare(replace(wanted, generated=tuple(generated)))


@pytest.fixture
async def engine() -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine(echo_info(), preparer(), ScriptStepper, max_waiting=8)
    yield engine
    await engine.close()


def without_progress(events: Sequence[GenerationEvent]) -> list[GenerationEvent]:
    return [event for event in events if not isinstance(event, PrefillProgress)]


@pytest.mark.parametrize("stop", [(), ("ENDING",), ("flog.", "🎈!")], ids=["plain", "end", "mid"])
@pytest.mark.parametrize("max_tokens", [None, 15])
async def test_an_answer_cut_after_any_event_goes_on_as_if_it_had_not_been(
    engine: BatchingEngine, stop: tuple[str, ...], max_tokens: int | None
) -> None:
    wanted = request("hello", stop=stop, max_tokens=max_tokens, top_logprobs=0)
    *whole, end = without_progress(await run(engine, wanted))
    for place in range(1, len(whole)):
        before = whole[:place]
        rest = await run(engine, replace(wanted, generated=tuple(token_ids_of(before))))
        *after, finished = without_progress(rest)
        assert [*before, *after] == whole
        assert (end_of([finished]).usage, end_of([finished]).reason) == (
            end_of([end]).usage,
            end_of([end]).reason,
        )


async def test_a_continued_answer_counts_its_first_tokens_as_completion(
    engine: BatchingEngine,
) -> None:
    events = await run(engine, replace(request("hello", max_tokens=6), generated=(68, 105)))
    usage = end_of(events).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 6)
    assert usage.cached_tokens == 5
    assert text_of(events) == "e M\ufffd"
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [event.total_tokens for event in progress] == [7]


def test_the_tokens_are_computed_with_the_prompt_and_leave_less_to_generate() -> None:
    prepared = continued(b"abc")
    assert bytes(prepared.prompt) == b"helloabc"
    assert (prepared.generated, prepared.max_tokens) == (3, 7)
    assert prepared.take_initial_events() == []


async def test_a_continuation_that_a_smaller_context_cannot_hold_ends_with_length() -> None:
    small = preparer(context_tokens=8)
    engine = BatchingEngine(echo_info(), small, ScriptStepper, max_waiting=8)
    events = await run(engine, replace(request("hello", max_tokens=20), generated=(68,) * 6))
    await engine.close()
    assert text_of(events) == ""
    assert end_of(events).reason == "length"
    assert end_of(events).usage.completion_tokens == 6


async def test_a_continuation_after_a_whole_stop_string_ends_with_stop(
    engine: BatchingEngine,
) -> None:
    wanted = replace(request("hello", stop=["Die"]), generated=tuple(b"Die"))
    events = await run(engine, wanted)
    assert [event for event in events if isinstance(event, TextDelta)] == []
    assert end_of(events).reason == "stop"
    assert end_of(events).usage.completion_tokens == 3


@pytest.mark.parametrize("token_id", [-1, END_TOKEN + 1])
def test_generated_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        continued([65, token_id])


class RecordingMask:
    """A grammar that allows everything and notes what was chosen."""

    is_active = True
    is_finished = False
    problem = ""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def apply(self, logits: NDArray[np.float32]) -> None:
        del logits

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def restart(self, data: bytes) -> bool:
        self.accepted.clear()
        return not data


class MaskingTokenizer(ByteTokenizer):
    """Has a grammar for everything."""

    can_constrain = True

    def __init__(self) -> None:
        self.made = RecordingMask()

    def mask(self, constraint: Constraint) -> RecordingMask:
        del constraint
        return self.made


def test_the_grammar_stands_after_the_generated_tokens() -> None:
    tokenizer = MaskingTokenizer()
    wanted = replace(request("hello", output=JsonOutput()), generated=tuple(b'{"a'))
    prepared = preparer(tokenizer).prepare(wanted)
    assert prepared.mask is tokenizer.made
    assert bytes(tokenizer.made.accepted) == b'{"a'


LOGITS = np.linspace(1.0, 0.0, 12, dtype=np.float32)
SEEDED = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5}


@pytest.mark.parametrize(
    "params",
    [
        SEEDED,
        {"temperature": 0.0, "presence_penalty": 0.15},
        {"temperature": 0.0, "frequency_penalty": 0.07},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {**SEEDED, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    ],
    ids=["seed", "presence", "frequency", "repetition", "all"],
)
def test_a_sampler_goes_on_where_the_other_stood(params: dict[str, Any]) -> None:
    def sampler(generated: tuple[int, ...]) -> RowSampler:
        sampling = SamplingParams(**params)
        spec = SequenceSpec(1, (3, 4, *generated), sampling, 99, generated=len(generated))
        return RowSampler(spec, len(LOGITS), lambda token: bytes((token,)))

    def draw(chosen: RowSampler, count: int) -> tuple[int, ...]:
        return tuple(chosen.sample(LOGITS.copy())[0] for _ in range(count))

    whole = draw(sampler(()), 24)
    assert len(set(whole)) > 1
    for place in range(1, 24):
        assert draw(sampler(whole[:place]), 24 - place) == whole[place:]
