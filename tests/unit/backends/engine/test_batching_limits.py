"""Limits set on a running engine: fewer sequences, pauses, smaller chunks, nothing lost."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from backends.engine.batching import BatchingEngine
from backends.limits import UNLIMITED, EngineLimits, Limitable
from core.errors import EngineFailed, Unavailable
from tests.requests import end_of, request, run, text_of
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine, until

# Longer than any test may last: what waits for the pause to pass never ends.
HELD = EngineLimits(decode_pause_s=3600.0)


class ChunkedStepper(FakeStepper):
    """A stepper that remembers the chunk sizes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[int | None] = []

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        self.chunks.append(chunk_tokens)


@pytest.fixture
async def stepper() -> AsyncIterator[ChunkedStepper]:
    stepper = ChunkedStepper()
    yield stepper
    stepper.gate.set()


@pytest.fixture
async def engine(stepper: ChunkedStepper) -> AsyncIterator[BatchingEngine]:
    engine = open_engine(stepper)
    yield engine
    stepper.gate.set()
    await engine.close()


def start(engine: BatchingEngine, count: int, max_tokens: int = 3) -> list["asyncio.Task[str]"]:
    async def answer() -> str:
        return text_of(await run(engine, request("a", max_tokens=max_tokens)))

    return [asyncio.ensure_future(answer()) for _ in range(count)]


async def end(tasks: list["asyncio.Task[str]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("limits", "sequences"),
    [(UNLIMITED, 4), (EngineLimits(8), 4), (EngineLimits(2), 2), (EngineLimits(0), 0)],
)
def test_limits_never_raise_the_capacity(limits: EngineLimits, sequences: int) -> None:
    assert limits.sequences(4) == sequences
    assert limits.admits == bool(sequences)


@pytest.mark.parametrize(("now", "left"), [(10.0, 0.5), (10.2, 0.3), (10.5, 0.0), (99.0, 0.0)])
def test_the_pause_runs_from_the_last_step(now: float, left: float) -> None:
    limits = EngineLimits(decode_pause_s=0.5)
    assert limits.pause_left_s(10.0, now) == pytest.approx(left)


async def test_fewer_sequences_hold_back_those_that_wait(
    engine: BatchingEngine, stepper: ChunkedStepper
) -> None:
    engine.set_limits(EngineLimits(max_sequences=1))
    answers = await asyncio.gather(*start(engine, 5))
    assert answers == ["xxx"] * 5
    assert stepper.most_running == 1


async def test_running_sequences_finish_when_the_limit_falls_below_them(
    engine: BatchingEngine, stepper: ChunkedStepper
) -> None:
    engine.set_limits(HELD)
    tasks = start(engine, 4)
    await until(lambda: engine.load().running == 2 and engine.load().waiting == 2)
    engine.set_limits(EngineLimits(max_sequences=1))
    assert await asyncio.gather(*tasks) == ["xxx"] * 4
    assert stepper.most_running == 2


async def test_no_admission_finishes_what_runs_and_refuses_new_requests(
    engine: BatchingEngine,
) -> None:
    engine.set_limits(HELD)
    tasks = start(engine, 3)
    await until(lambda: engine.load().running == 2 and engine.load().waiting == 1)
    engine.set_limits(EngineLimits(max_sequences=0))
    with pytest.raises(Unavailable, match="no new requests") as caught:
        await run(engine, request("a"))
    assert caught.value.retry_after_s
    await until(lambda: not engine.load().running)
    assert engine.load().waiting == 1
    engine.set_limits(UNLIMITED)
    assert await asyncio.gather(*tasks) == ["xxx"] * 3


async def test_a_resumed_answer_waits_instead_of_being_refused(engine: BatchingEngine) -> None:
    engine.set_limits(EngineLimits(max_sequences=0))
    resumed = replace(request("a", max_tokens=3), generated=(ord("x"),))
    answer = asyncio.ensure_future(run(engine, resumed))
    await until(lambda: len(engine._loop._waiting) == 1)
    engine.set_limits(UNLIMITED)
    assert end_of(await answer).usage.completion_tokens == 3


async def test_an_engine_that_may_run_nothing_does_not_spin(engine: BatchingEngine) -> None:
    engine.set_limits(HELD)
    tasks = start(engine, 3)
    await until(lambda: engine.load().running == 2 and engine.load().waiting == 1)
    engine.set_limits(EngineLimits(max_sequences=0))
    await until(lambda: not engine.load().running)
    assert engine._loop._idle_s() is None
    await end(tasks)


async def test_a_pause_delays_neither_cancellation_nor_new_limits(
    engine: BatchingEngine, stepper: ChunkedStepper
) -> None:
    engine.set_limits(HELD)
    events = engine.generate(request("a", max_tokens=200))
    await anext(events)
    (other,) = start(engine, 1, max_tokens=20)
    await until(lambda: len(stepper.running) == 2)
    await events.aclose()
    await until(lambda: len(stepper.running) < 2)
    engine.set_limits(UNLIMITED)
    assert await other == "x" * 20


async def test_a_pause_does_not_delay_closing(stepper: ChunkedStepper) -> None:
    engine = open_engine(stepper)
    engine.set_limits(HELD)
    events = engine.generate(request("a", max_tokens=200))
    await anext(events)
    await engine.close()
    assert stepper.is_closed
    with pytest.raises(EngineFailed, match="unloaded"):
        async for _ in events:
            pass


async def test_new_requests_do_not_cut_the_pause_short(
    engine: BatchingEngine, stepper: ChunkedStepper
) -> None:
    engine.set_limits(HELD)
    first = start(engine, 1)
    await until(stepper.stepping.is_set)
    stepper.stepping.clear()
    others = start(engine, 4)
    await until(lambda: len(engine._loop._waiting) == 3)
    others[-1].cancel()
    # The engine has been round since the requests came.
    await until(lambda: len(engine._loop._waiting) == 2)
    assert not stepper.stepping.is_set()
    await end([*first, *others])


async def test_paced_answers_are_the_same(engine: BatchingEngine) -> None:
    plain = await run(engine, request("a", max_tokens=5))
    engine.set_limits(EngineLimits(1, 16, 0.001))
    paced = await run(engine, request("a", max_tokens=5))
    assert text_of(paced) == text_of(plain) == "xxxxx"
    assert end_of(paced).usage == end_of(plain).usage


async def test_prompt_chunks_follow_the_limits_on_the_engines_thread(
    engine: BatchingEngine, stepper: ChunkedStepper
) -> None:
    await run(engine, request("a", max_tokens=1))
    assert stepper.chunks == []
    engine.set_limits(EngineLimits(prefill_chunk_tokens=64))
    await run(engine, request("a", max_tokens=2))
    engine.set_limits(UNLIMITED)
    await run(engine, request("a", max_tokens=2))
    assert stepper.chunks == [64, None]


async def test_steppers_without_chunks_obey_the_rest() -> None:
    stepper = FakeStepper()
    engine = open_engine(stepper)
    assert isinstance(engine, Limitable)
    engine.set_limits(EngineLimits(1, 64))
    assert await asyncio.gather(*start(engine, 3)) == ["xxx"] * 3
    assert stepper.most_running == 1
    await engine.close()
