"""Seconds that limits cost, by a clock that the test moves."""

import threading
from types import SimpleNamespace

import pytest

from backends.engine.batching import BatchingEngine
from backends.engine.pacing import Pacer
from backends.limits import UNLIMITED, EngineLimits
from tests.requests import end_of, request, run
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class PassingTime(threading.Condition):
    """Lets time pass instead of waiting."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.now += 7.0 if timeout is None else timeout
        return timeout is None


class RestingTime(threading.Condition):
    """Lets time pass instead of a pause, and waits for commands as usual."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            return super().wait()
        self._clock.now += timeout
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("backends.engine.pacing.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_pauses_are_counted_and_idleness_is_not(clock: Clock) -> None:
    pacer = Pacer()
    pacer.limits = EngineLimits(decode_pause_s=0.5)
    wake = PassingTime(clock)
    pacer.note_step()
    clock.now += 0.2
    pacer.rest(wake, pacer.pause_left_s())
    pacer.rest(wake, None)
    assert pacer.paused_s == pytest.approx(0.3)
    assert pacer.pause_left_s() == 0


def test_holding_back_is_counted_while_it_lasts(clock: Clock) -> None:
    pacer = Pacer()
    for is_limited, passes in ((False, 1.0), (True, 2.0), (True, 3.0), (False, 4.0), (True, 5.0)):
        pacer.set_limited(is_limited)
        clock.now += passes
    assert pacer.limited_s() == pytest.approx(10.0)


def test_new_limits_reach_the_stepper_once() -> None:
    chunks: list[int | None] = []
    stepper = SimpleNamespace(limit_prefill=chunks.append)
    pacer = Pacer()
    for limits in (UNLIMITED, EngineLimits(prefill_chunk_tokens=64), UNLIMITED):
        pacer.limits = limits
        pacer.apply_to(stepper)
        pacer.apply_to(stepper)
    assert chunks == [64, None]


async def throttled(limits: EngineLimits) -> float:
    """Return the seconds that one of two requests lost under limits."""
    engine: BatchingEngine = open_engine(FakeStepper())
    engine.set_limits(limits)
    timing = end_of(await run(engine, request("a", max_tokens=3))).timing
    await engine.close()
    whole = timing.queued_s + timing.prefill_s + timing.decode_s
    assert 0 <= timing.throttled_s <= whole
    return timing.throttled_s


async def test_a_request_knows_what_pauses_cost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await throttled(UNLIMITED) == 0
    clock = Clock()
    for module in ("pacing", "loop", "batching"):
        fake = SimpleNamespace(monotonic=clock.monotonic)
        monkeypatch.setattr(f"backends.engine.{module}.time", fake)
    threads = SimpleNamespace(Condition=lambda: RestingTime(clock), Thread=threading.Thread)
    monkeypatch.setattr("backends.engine.loop.threading", threads)
    # The pauses before the second and the third token.
    assert await throttled(EngineLimits(decode_pause_s=0.5)) == pytest.approx(1.0)
