"""Whatever hangs on an engine's thread is told to the health check; waiting is not."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from backends.echo import echo_info
from backends.engine.batching import BatchingEngine
from backends.limits import EngineLimits
from core.types import GenerationEvent
from tests.requests import request, run
from tests.unit.backends.engine.faulty import FaultyPreparer, FaultyStepper, until

PLACES = ["add", "step", "remove", "counters", "limit_prefill", "do_chore", "close"]


class HangingStepper(FaultyStepper):
    """Hangs in one of its methods until it is let go."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.go = threading.Event()
        self.has_work = place == "do_chore"
        real: Callable[..., Any] = getattr(self, place)

        def hang(*arguments: Any) -> Any:
            self.has_work = False
            self.go.wait()
            return real(*arguments)

        setattr(self, place, hang)

    @property
    def has_chores(self) -> bool:
        return self.has_work


def open_over(stepper: FaultyStepper) -> BatchingEngine:
    return BatchingEngine(echo_info(), FaultyPreparer(), lambda: stepper, max_waiting=64)


@pytest.mark.parametrize("place", PLACES)
async def test_a_stepper_that_hangs_is_told(place: str) -> None:
    stepper = HangingStepper(place)
    engine = open_over(stepper)
    engine.set_limits(EngineLimits(prefill_chunk_tokens=3))
    running = asyncio.ensure_future(run(engine, request("x text", max_tokens=64)))
    closing = asyncio.ensure_future(engine.close()) if place == "close" else None
    await until(lambda: engine.stalled_s > 0.02)
    stepper.go.set()
    await asyncio.gather(running, return_exceptions=True)
    if closing is not None:
        await closing
    await until(lambda: engine.stalled_s == 0.0)
    await engine.close()


async def test_a_receiver_that_hangs_is_told() -> None:
    go = threading.Event()

    class Hanging:
        def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
            del batch
            go.wait()

    engine = open_over(FaultyStepper())
    running = asyncio.ensure_future(engine.stream_to(request("x", max_tokens=4), Hanging()))
    await until(lambda: engine.stalled_s > 0.02)
    go.set()
    await running
    await engine.close()


async def test_an_engine_that_waits_for_the_accelerator_or_for_requests_does_not_hang() -> None:
    engine = open_over(FaultyStepper())
    await run(engine, request("x", max_tokens=4))
    await until(lambda: engine.stalled_s == 0.0)
    held, entered = threading.Lock(), threading.Event()

    class Lock:
        @contextmanager
        def hold(self) -> Any:
            entered.set()
            with held:
                yield

    lock: Any = Lock()
    engine.share_accelerator(lock)
    with held:
        waiting = asyncio.ensure_future(run(engine, request("x", max_tokens=4)))
        await until(entered.is_set)
        assert engine.stalled_s == 0.0
    await waiting
    await engine.close()
