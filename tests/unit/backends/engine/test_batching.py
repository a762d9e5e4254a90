"""The batching engine over a stepper that the test controls."""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace

import pytest

from backends.abilities import count_tokens, tokenize
from backends.base import Engine, EngineLoad
from backends.echo import END_TOKEN, ByteTokenizer, echo_info
from backends.engine.batching import BatchingEngine
from backends.prefixes.reuse import Reuse
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Preparer
from backends.stepper import SequenceSpec, StepOutput
from core.errors import (
    BrokenModel,
    EngineFailed,
    QueueFull,
    RequestError,
    TimedOut,
    UnsupportedCapability,
    UnsupportedParameter,
)
from core.types import (
    CacheOutcome,
    GenerationEvent,
    GenerationRequest,
    JsonOutput,
    PrefillProgress,
    TextPrompt,
    TokenizedPrompt,
    TokenizeOptions,
    TokenPrompt,
)
from tests.requests import chat, end_of, request, run, text_of


class FakeStepper:
    """Answers every sequence with `x`; steps only while the gate is open."""

    def __init__(self, max_sequences: int = 2) -> None:
        self.max_sequences = max_sequences
        self.gate = threading.Event()
        self.gate.set()
        self.stepping = threading.Event()
        self.running: set[int] = set()
        self.most_running = 0
        self.problem: Exception | None = None
        self.refusal: RequestError | None = None
        self.is_closed = False
        self.threads: set[int] = set()

    def add(self, spec: SequenceSpec) -> None:
        self.threads.add(threading.get_ident())
        if self.refusal is not None:
            raise self.refusal
        self.running.add(spec.id)
        self.most_running = max(self.most_running, len(self.running))

    def remove(self, sequence_id: int) -> None:
        self.running.discard(sequence_id)

    def step(self) -> list[StepOutput]:
        self.threads.add(threading.get_ident())
        self.stepping.set()
        self.gate.wait()
        if self.problem is not None:
            raise self.problem
        return [StepOutput(sequence_id, ord("x")) for sequence_id in self.running]

    def counters(self) -> EngineLoad:
        return EngineLoad(steps=1)

    def close(self) -> None:
        self.is_closed = True


def open_engine(stepper: FakeStepper, *, max_waiting: int = 8) -> BatchingEngine:
    preparer = Preparer(echo_info(), ByteTokenizer(), ChatFormat(None, "", ""), context_tokens=256)
    return BatchingEngine(echo_info(), preparer, lambda: stepper, max_waiting=max_waiting)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
async def stepper() -> AsyncIterator[FakeStepper]:
    stepper = FakeStepper()
    yield stepper
    stepper.gate.set()


async def test_a_runtime_that_ends_the_process_refuses_the_model_instead() -> None:
    def open_stepper() -> FakeStepper:
        sys.exit(3)

    preparer = Preparer(echo_info(), ByteTokenizer(), ChatFormat(None, "", ""), context_tokens=256)
    with pytest.raises(BrokenModel, match="exit code 3"):
        BatchingEngine(echo_info(), preparer, open_stepper, max_waiting=8)


async def test_an_engine_tells_the_limitations_of_its_stepper(stepper: FakeStepper) -> None:
    plain = open_engine(stepper)
    assert plain.limitations == ()
    limited = FakeStepper()
    limited.limitations = ("m is slow.",)  # type: ignore[attr-defined]
    engine = open_engine(limited)
    assert engine.limitations == ("m is slow.",)
    await plain.close()
    await engine.close()


async def test_the_stepper_lives_on_one_thread_of_its_own(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    await asyncio.gather(*(run(engine, request("a", max_tokens=3)) for _ in range(5)))
    assert len(stepper.threads) == 1
    assert threading.get_ident() not in stepper.threads
    await engine.close()
    assert stepper.is_closed


async def test_the_first_event_tells_the_tokens_of_a_short_prompt(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    fresh = request("abc", max_tokens=3)
    events = await run(engine, fresh)
    count = end_of(events).usage.prompt_tokens
    assert events[0] == PrefillProgress(count, count)
    assert sum(isinstance(event, PrefillProgress) for event in events) == 1
    # The client of a resumed answer knows it already.
    events = await run(engine, replace(fresh, generated=(ord("x"),)))
    assert not any(isinstance(event, PrefillProgress) for event in events)
    await engine.close()


class SlowVocabulary(ByteTokenizer):
    """Records when its vocabulary is read, which lasts until the test says so."""

    def __init__(self) -> None:
        self.reading = threading.Event()
        self.may_end = threading.Event()
        self.has_ended = False

    def read_vocabulary(self) -> None:
        self.reading.set()
        self.may_end.wait()
        self.has_ended = True


async def test_the_vocabulary_is_read_beside_the_opening_and_delays_nothing(
    stepper: FakeStepper,
) -> None:
    tokenizer = SlowVocabulary()
    preparer = Preparer(echo_info(), tokenizer, ChatFormat(None, "", ""), context_tokens=256)

    def open_stepper() -> FakeStepper:
        assert tokenizer.reading.wait(30)
        return stepper

    engine = BatchingEngine(echo_info(), preparer, open_stepper, max_waiting=8)
    assert text_of(await run(engine, request("a", max_tokens=2))) == "xx"
    assert not tokenizer.has_ended
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.05)
    assert not stepper.is_closed
    tokenizer.may_end.set()
    await closing
    assert tokenizer.has_ended
    assert stepper.is_closed


async def test_a_vocabulary_that_cannot_be_read_costs_grammars_only(stepper: FakeStepper) -> None:
    class Broken(ByteTokenizer):
        def read_vocabulary(self) -> None:
            raise ValueError("a token is no text")

    preparer = Preparer(echo_info(), Broken(), ChatFormat(None, "", ""), context_tokens=256)
    engine = BatchingEngine(echo_info(), preparer, lambda: stepper, max_waiting=8)
    assert text_of(await run(engine, request("a", max_tokens=2))) == "xx"
    await engine.close()


async def test_no_more_sequences_run_than_the_stepper_takes(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    answers = await asyncio.gather(*(run(engine, request("a", max_tokens=3)) for _ in range(6)))
    assert [text_of(events) for events in answers] == ["xxx"] * 6
    assert stepper.most_running == 2
    await engine.close()


async def test_tokens_are_counted_until_the_engine_closes(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    assert await count_tokens(engine, TextPrompt("abc")) == 3
    await engine.close()
    with pytest.raises(EngineFailed, match="unloaded"):
        await engine.count_tokens(TextPrompt("abc"))


@pytest.mark.parametrize(
    "prompt", [TextPrompt("aé"), TokenPrompt(tuple("aé".encode())), TokenPrompt((97, 195, 169))]
)
async def test_prompt_is_shown_as_the_model_reads_it(
    stepper: FakeStepper, prompt: TextPrompt | TokenPrompt
) -> None:
    engine = open_engine(stepper)
    found = await tokenize(engine, prompt, TokenizeOptions())
    assert found == TokenizedPrompt("aé", (97, 195, 169), (b"a", b"\xc3", b"\xa9"))
    assert len(found.token_ids) == await count_tokens(engine, prompt)
    cut = await tokenize(engine, TokenPrompt((97, 195)), TokenizeOptions())
    assert cut.text == "a\ufffd"
    with pytest.raises(RequestError, match="outside the vocabulary"):
        await tokenize(engine, TokenPrompt((2**31 - 1,)), TokenizeOptions())
    await engine.close()
    with pytest.raises(EngineFailed, match="unloaded"):
        await tokenize(engine, prompt, TokenizeOptions())


async def test_counting_tokens_ends_at_its_deadline(
    stepper: FakeStepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(Preparer, "count", lambda *_: gate.wait() and 0)
    engine = open_engine(stepper)
    with pytest.raises(TimedOut) as caught:
        await count_tokens(engine, TextPrompt("abc"), deadline_s=0.01)
    assert (caught.value.status, caught.value.code) == (504, "timed_out")
    gate.set()
    await engine.close()


async def test_engine_that_cannot_count_says_so() -> None:
    class Wordless(Engine):
        info = echo_info()

        def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
            raise NotImplementedError

        def load(self) -> EngineLoad:
            return EngineLoad()

        async def close(self) -> None:
            return

    with pytest.raises(UnsupportedCapability, match="cannot count tokens"):
        await count_tokens(Wordless(), TextPrompt("abc"))
    with pytest.raises(UnsupportedCapability, match="cannot count tokens"):
        await tokenize(Wordless(), TextPrompt("abc"), TokenizeOptions())


async def test_a_full_queue_refuses_at_once_with_retry_after() -> None:
    stepper = FakeStepper(max_sequences=1)
    engine = open_engine(stepper, max_waiting=2)
    stepper.gate.clear()
    accepted = [asyncio.ensure_future(run(engine, request("a", max_tokens=1)))]
    await until(stepper.stepping.is_set)
    accepted += [asyncio.ensure_future(run(engine, request("a", max_tokens=1))) for _ in range(2)]
    await until(lambda: engine.load().waiting == 2)
    with pytest.raises(QueueFull) as caught:
        await run(engine, request("a"))
    assert caught.value.retry_after_s
    stepper.gate.set()
    assert all(text_of(events) == "x" for events in await asyncio.gather(*accepted))
    await engine.close()


async def test_a_failing_step_fails_every_request_and_the_engine(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    stepper.gate.clear()
    running = [asyncio.ensure_future(run(engine, request("a"))) for _ in range(4)]
    await until(stepper.stepping.is_set)
    stepper.problem = RuntimeError("the device is gone")
    stepper.gate.set()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, EngineFailed) for result in results)
    assert "the device is gone" in str(results[0])
    assert engine.is_failed
    with pytest.raises(EngineFailed):
        await run(engine, request("a"))
    await engine.close()
    assert stepper.is_closed


async def test_a_refused_sequence_leaves_the_others_alone(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    stepper.refusal = RequestError("not this one", param="seed")
    with pytest.raises(RequestError, match="not this one"):
        await run(engine, request("a"))
    stepper.refusal = None
    assert text_of(await run(engine, request("a", max_tokens=2))) == "xx"
    await engine.close()


async def test_a_waiting_request_that_is_cancelled_never_starts(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    stepper.gate.clear()
    running = [asyncio.ensure_future(run(engine, request("a", max_tokens=2))) for _ in range(2)]
    await until(stepper.stepping.is_set)
    waiting = asyncio.ensure_future(run(engine, request("b", max_tokens=2)))
    await until(lambda: engine.load().waiting >= 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    stepper.gate.set()
    await asyncio.gather(*running)
    await run(engine, request("c", max_tokens=1))
    assert engine.load().waiting == 0
    assert engine.load().running == 0
    await engine.close()


async def test_a_cancelled_sequence_is_removed_by_the_next_step(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    events = engine.generate(request("a", max_tokens=200))
    await anext(events)
    await events.aclose()
    await until(lambda: not stepper.running)
    await engine.close()


async def test_a_stepper_that_cannot_open_raises_its_own_error() -> None:
    def fail() -> FakeStepper:
        raise EngineFailed("no device")

    preparer = Preparer(echo_info(), ByteTokenizer(), ChatFormat(None, "", ""), context_tokens=256)
    with pytest.raises(EngineFailed, match="no device"):
        BatchingEngine(echo_info(), preparer, fail, max_waiting=1)


async def test_max_tokens_never_exceed_the_context(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    events = await run(engine, request("a" * 250, max_tokens=1000))
    assert end_of(events).usage.completion_tokens == 6
    assert end_of(events).reason == "length"
    await engine.close()


async def test_no_new_token_gives_the_prompt_alone(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    events = await run(engine, request("hello", max_tokens=0, echo_prompt=True))
    assert text_of(events) == "hello"
    assert end_of(events).reason == "length"
    assert end_of(events).usage.completion_tokens == 0
    assert not stepper.threads
    await engine.close()


async def test_the_plain_fallback_stops_before_the_next_user(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    prepared = engine._preparer.prepare(request(chat("hi")))
    assert bytes(prepared.prompt).decode().endswith("Assistant:")
    for character in "yes\nUser: no":
        prepared.assembler.push(StepOutput(1, ord(character)))
    assert prepared.assembler.reason == "stop"
    await engine.close()


async def test_a_tokenizer_without_grammar_refuses_constraints(stepper: FakeStepper) -> None:
    engine = open_engine(stepper)
    with pytest.raises(UnsupportedParameter) as caught:
        await run(engine, request("a", output=JsonOutput()))
    assert caught.value.param == "response_format"
    await engine.close()


def test_the_end_token_is_outside_the_bytes() -> None:
    assert ByteTokenizer().token_bytes(END_TOKEN) == b""
    assert ByteTokenizer().vocabulary_size == END_TOKEN + 1


class BusyStepper(FakeStepper):
    """Has chores, and says where cached tokens came from."""

    def __init__(self) -> None:
        super().__init__()
        self.chores = 3
        self.chores_beside: list[int] = []

    @property
    def has_chores(self) -> bool:
        return self.chores > 0

    def do_chore(self) -> None:
        self.chores_beside.append(len(self.running))
        self.chores -= 1

    def step(self) -> list[StepOutput]:
        reuse = Reuse(ram=1, miss="diverged", diverged_at=1, known=(ord("q"),))
        return [replace(each, cached=1, reuse=reuse) for each in super().step()]


async def test_chores_are_done_while_nothing_runs() -> None:
    stepper = BusyStepper()
    engine = open_engine(stepper)
    await until(lambda: not stepper.chores)
    await run(engine, request("a", max_tokens=2))
    stepper.chores = 2
    await run(engine, request("a", max_tokens=2))
    await until(lambda: not stepper.chores)
    assert stepper.chores_beside == [0] * 5
    await engine.close()


async def test_the_end_tells_what_was_cached_and_why_no_more() -> None:
    engine = open_engine(BusyStepper())
    end = end_of(await run(engine, request("abc", max_tokens=2)))
    assert end.usage.cached_tokens == 1
    assert end.cache == CacheOutcome(0, 1, 0, "diverged", 1, "a", "q", "bc")
    await engine.close()
