"""A request fails alone, wherever it fails, and whatever has ended is resolved."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.echo import echo_info
from backends.engine.batching import BatchingEngine
from backends.engine.loop import EngineLoop
from backends.limits import EngineLimits
from backends.prompt.prepare import Prepared
from core.errors import EngineFailed, ImpetusError, RequestFailed
from core.types import Finished, GenerationRequest
from tests.requests import end_of, request, run, text_of
from tests.unit.backends.engine.faulty import (
    FAULTS,
    HARMLESS,
    CountedRequest,
    FaultyPreparer,
    FaultyReceiver,
    FaultyStepper,
    counted_request,
    until,
)

INNOCENT = "x is innocent"


@pytest.fixture
def stepper() -> FaultyStepper:
    return FaultyStepper()


@pytest.fixture
async def engine(stepper: FaultyStepper) -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine(echo_info(), FaultyPreparer(), lambda: stepper, max_waiting=64)
    yield engine
    await engine.close()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_request_fails_alone(
    engine: BatchingEngine,
    stepper: FaultyStepper,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver = FaultyReceiver()

    def start(text: str, number: int) -> "asyncio.Task[Finished]":
        wanted = replace(request(text, max_tokens=64), id=f"{text[0]}-{number}")
        return asyncio.ensure_future(engine.stream_to(wanted, receiver))

    beside = [start(f"{INNOCENT} {number}", number) for number in range(2)]
    bad = start(FAULTS[fault] + " is not", 9)
    waiting = [start(f"{INNOCENT} {number}", number) for number in range(2, 4)]
    ends = await asyncio.gather(*beside, *waiting)
    assert [end.reason for end in ends] == ["stop"] * 4
    for number in range(4):
        assert text_of(receiver.events[f"x-{number}"]) == f"{INNOCENT} {number}"
    if fault in HARMLESS:
        assert (await bad).reason == "stop"
    else:
        with pytest.raises(RequestFailed) as caught:
            await bad
        assert (caught.value.status, caught.value.code) == (500, "request_failed")
        assert "Traceback" not in caught.value.message
    assert not engine.is_failed
    assert engine.load().running == 0
    await until(lambda: not stepper.left)
    logged = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert len(logged) <= 1
    assert all(one.exc_info for one in logged)
    again = await run(engine, request("x again", max_tokens=64))
    assert text_of(again) == "x again"


async def test_an_unexpected_exception_is_logged_once_with_its_traceback(
    engine: BatchingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RequestFailed, match=r"its answer \(RecursionError: too deep\)"):
        await run(engine, request(FAULTS["assembler"] + "bc"))
    (logged,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert logged.exc_info is not None


async def test_a_receiver_that_always_raises_fails_its_requests_only(
    engine: BatchingEngine,
) -> None:
    class Raising:
        def deliver(self, batch: object) -> None:
            del batch
            raise OSError("the socket is gone")

    receiver = FaultyReceiver()
    bad = [
        asyncio.ensure_future(engine.stream_to(request("x bad", max_tokens=64), broken))
        for broken in [Raising()] * 2
    ]
    good = replace(request(INNOCENT, max_tokens=64), id="x-1")
    assert (await engine.stream_to(good, receiver)).reason == "stop"
    assert text_of(receiver.events["x-1"]) == INNOCENT
    for one in bad:
        with pytest.raises(RequestFailed, match="the socket is gone"):
            await one
    assert not engine.is_failed


@pytest.mark.parametrize("error", [ValueError("bug"), TimeoutError("bug"), KeyError("bug")])
async def test_a_preparation_that_raises_fails_its_request_alone(
    engine: BatchingEngine, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FaultyPreparer.prepare

    def prepare(preparer: FaultyPreparer, wanted: GenerationRequest) -> Prepared:
        if wanted.id == "bad":
            raise error
        return real(preparer, wanted)

    monkeypatch.setattr(FaultyPreparer, "prepare", prepare)
    good = asyncio.ensure_future(run(engine, request(INNOCENT, max_tokens=64)))
    bad = replace(request("x", max_tokens=4, deadline_s=60.0), id="bad")
    with pytest.raises(RequestFailed, match=r"its preparation \(\w+: .?bug"):
        await run(engine, bad)
    assert text_of(await good) == INNOCENT


async def test_a_request_without_new_tokens_whose_end_cannot_be_delivered(
    engine: BatchingEngine,
) -> None:
    wanted = replace(request("x", max_tokens=0), id=FAULTS["delivery"])
    with pytest.raises(RequestFailed, match="delivery"):
        await engine.stream_to(wanted, FaultyReceiver())


@pytest.mark.parametrize("place", ["has_chores", "do_chore", "counters", "limit_prefill"])
async def test_what_no_request_depends_on_is_left_out_once_it_raised(
    engine: BatchingEngine,
    stepper: FaultyStepper,
    place: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stepper.breaks.add(place)
    engine.set_limits(EngineLimits(prefill_chunk_tokens=3))
    for _ in range(2):
        assert text_of(await run(engine, request(INNOCENT, max_tokens=64))) == INNOCENT
    await until(lambda: any(one.exc_info for one in caplog.records))
    assert len([one for one in caplog.records if one.exc_info]) == 1
    assert not engine.is_failed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
async def test_every_request_is_resolved_when_the_thread_ends(
    stepper: FaultyStepper, error: type[BaseException]
) -> None:
    engine = BatchingEngine(echo_info(), FaultyPreparer(), lambda: stepper, max_waiting=64)
    gate = threading.Event()

    def fail() -> list[object]:
        gate.wait()
        raise error("gone")

    stepper.step = fail  # type: ignore[method-assign, assignment]
    tasks = [asyncio.ensure_future(run(engine, request(INNOCENT))) for _ in range(5)]
    await until(lambda: engine.load().running + engine.load().waiting == 5)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineFailed] * 5
    assert engine.is_failed
    await engine.close()
    assert stepper.closed == 1


async def test_a_stepper_that_cannot_be_closed_ends_the_thread_all_the_same(
    stepper: FaultyStepper,
) -> None:
    stepper.breaks.add("close")
    engine = BatchingEngine(echo_info(), FaultyPreparer(), lambda: stepper, max_waiting=64)
    await run(engine, request(INNOCENT))
    await engine.close()
    assert engine.stalled_s == 0.0


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(sorted([*FAULTS.values(), "x", "x", "x"]))),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["break the step", "close"]), st.just(0)),
)


class Scenario:
    """An engine's thread, and what was submitted to it."""

    def __init__(self, *, is_shared: bool) -> None:
        self.stepper = FaultyStepper()
        self.loop = EngineLoop("echo", lambda: self.stepper, lambda: None)
        self._shared = FaultyReceiver() if is_shared else None
        self.submitted: list[tuple[CountedRequest, FaultyReceiver]] = []
        self._cancelled: set[int] = set()

    def do(self, action: str, value: object) -> None:
        if action == "submit":
            receiver = self._shared or FaultyReceiver()
            one = counted_request(f"{value} text", receiver, len(self.submitted))
            with contextlib.suppress(EngineFailed):
                self.loop.submit(one)
                self.submitted.append((one, receiver))
        elif action == "cancel" and self.submitted:
            chosen, _ = self.submitted[int(str(value)) % len(self.submitted)]
            self._cancelled.add(chosen.id)
            self.loop.cancel(chosen)
        elif action == "wait":
            with self.stepper.stepped:
                wanted = self.stepper.steps + int(str(value))
                self.stepper.stepped.wait_for(lambda: self.stepper.steps >= wanted, timeout=0.02)
        elif action == "break the step":
            self.stepper.breaks.add("step")
        elif action == "close":
            self.loop.close()

    def check(self, one: CountedRequest, receiver: FaultyReceiver) -> None:
        """A request is resolved once, and a result never comes without its text."""
        is_cancelled = one.id in self._cancelled
        assert len(one.outcomes) == 1 or (is_cancelled and not one.outcomes)
        events = receiver.events.get(one.generation.id, [])
        assert sum(isinstance(event, Finished) for event in events) <= 1
        for outcome in one.outcomes:
            if isinstance(outcome, Finished):
                assert events[-1] is outcome
                assert text_of(events) == bytes(one.prepared.prompt).decode()
            else:
                assert isinstance(outcome, ImpetusError)


@settings(max_examples=80)
@given(st.lists(ACTIONS, max_size=30), st.booleans())
def test_each_request_is_resolved_exactly_once(
    actions: list[tuple[str, object]], is_shared: bool
) -> None:
    logging.disable(logging.CRITICAL)
    scenario = Scenario(is_shared=is_shared)
    try:
        for action, value in actions:
            scenario.do(action, value)
    finally:
        scenario.loop.close()
        logging.disable(logging.NOTSET)
    for one, receiver in scenario.submitted:
        scenario.check(one, receiver)
    assert scenario.stepper.closed == 1


async def test_the_end_of_a_stream_tells_its_usage_beside_a_failing_one(
    engine: BatchingEngine,
) -> None:
    good = asyncio.ensure_future(run(engine, request(INNOCENT, max_tokens=64)))
    with pytest.raises(ImpetusError):
        await run(engine, request(FAULTS["row problem"] + "bc"))
    usage = end_of(await good).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(INNOCENT), len(INNOCENT) + 1)
