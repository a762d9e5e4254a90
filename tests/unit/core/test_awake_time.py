"""Tests of timers and deadlines on an event loop whose clock goes on while the machine sleeps."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backends.limits import deadline
from core.awake_time import AwakeTimeout, AwakeTimer
from core.errors import TimedOut
from core.supervision import DEFAULT_POLICY, Supervisor
from deployments.router.dispatch import HandleDispatcher
from router.answers.event_feed import EventFeed
from router.answers.event_stream import _KeepAlive
from router.context import Pacing
from tests.requests import request

HOURS_S = 7200.0


class SleepingLoop(asyncio.SelectorEventLoop):
    """Its clock is uvloop's on macOS: it counts the time slept, `time.monotonic` does not."""

    slept_s = 0.0

    def time(self) -> float:
        return super().time() + self.slept_s


def sleep_now() -> None:
    """Let the machine sleep for two hours."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SleepingLoop)
    loop.slept_s += HOURS_S


def run(work: Coroutine[Any, Any, None]) -> None:
    loop = SleepingLoop()
    try:
        loop.run_until_complete(asyncio.wait_for(work, 3 * HOURS_S))
    finally:
        loop.close()


def test_the_loop_ends_asyncios_own_timeouts_as_macos_does() -> None:
    async def work() -> None:
        async with asyncio.timeout(3600):
            sleep_now()
            await asyncio.sleep(0.05)

    with pytest.raises(TimeoutError):
        run(work())


def test_a_request_goes_on_after_the_machine_slept() -> None:
    async def work() -> None:
        async with deadline(3600):
            sleep_now()
            await asyncio.sleep(0.05)

    run(work())


def test_a_deadline_counts_the_time_awake_before_and_after_the_sleep() -> None:
    async def work() -> None:
        async with deadline(0.2):
            sleep_now()
            await asyncio.sleep(HOURS_S * 2)

    began = time.monotonic()
    with pytest.raises(TimedOut):
        run(work())
    assert 0.19 < time.monotonic() - began < 30


def test_a_deadline_of_zero_and_none() -> None:
    async def work() -> None:
        with pytest.raises(TimedOut):
            async with deadline(0.0):
                await asyncio.sleep(60)
        async with deadline(None):
            sleep_now()
            await asyncio.sleep(0.01)

    run(work())


def test_a_timeout_of_the_body_itself_is_passed_on() -> None:
    async def work() -> None:
        with pytest.raises(TimeoutError, match="own"):
            async with deadline(60):
                raise TimeoutError("own")

    run(work())


def test_the_router_does_not_give_up_a_request_that_slept() -> None:
    async def work() -> None:
        end = asyncio.get_running_loop().create_future()
        asked = replace(request("hello"), deadline_s=3600.0)
        timer = HandleDispatcher._end_in_time(asked, end)
        assert timer is not None
        sleep_now()
        await asyncio.sleep(0.05)
        assert not end.done()
        timer.cancel()

    run(work())


@pytest.mark.parametrize(("limit_s", "is_ended"), [(60.0, False), (0.05, True)])
def test_a_client_that_slept_with_the_machine_has_not_stopped_reading(
    limit_s: float, is_ended: bool
) -> None:
    async def work() -> None:
        problems: list[Exception] = []
        reads = asyncio.Event()

        async def send(message: object) -> None:
            del message
            await reads.wait()

        feed = SimpleNamespace(abort=problems.append, wake=lambda: None, is_disconnected=False)
        pacing = Pacing(header_wait_s=0.02, early_keep_alive_s=0.02, write_timeout_s=limit_s)
        stream = _KeepAlive(cast("EventFeed", feed), pacing, send)
        writing = asyncio.create_task(stream.write("data: 1\n\n"))
        await asyncio.sleep(0)
        sleep_now()
        await asyncio.sleep(0.2)
        assert bool(problems) == is_ended
        reads.set()
        await writing
        stream.stop()

    run(work())


def test_a_part_that_slept_is_not_taken_for_hanging() -> None:
    async def work() -> None:
        supervisor = Supervisor()
        waiting = asyncio.Event()

        async def part() -> None:
            waiting.set()
            await asyncio.Event().wait()

        supervisor.keep_running("part", part, replace(DEFAULT_POLICY, silence_s=60.0))
        await waiting.wait()
        sleep_now()
        await asyncio.sleep(0.1)
        assert [(one.status, one.failures) for one in supervisor.parts()] == [("running", 0)]
        await supervisor.stop()

    run(work())


def test_a_timer_rings_once_and_not_after_cancel() -> None:
    async def work() -> None:
        rung: list[str] = []
        AwakeTimer(0.05, rung.append, "first")
        AwakeTimer(0.05, rung.append, "cancelled").cancel()
        slept = AwakeTimer(60.0, rung.append, "late")
        sleep_now()
        await asyncio.sleep(0.2)
        assert rung == ["first"]
        slept.cancel()

    run(work())


def test_a_restarted_timeout_counts_anew() -> None:
    async def work() -> None:
        async with AwakeTimeout(0.05) as timeout:
            timeout.restart(60.0)
            await asyncio.sleep(0.1)
        assert not timeout.expired()
        timeout = AwakeTimeout(None)
        with pytest.raises(TimeoutError):
            await restarted(timeout)
        assert timeout.expired()
        timeout.restart(60.0)

    async def restarted(timeout: AwakeTimeout) -> None:
        async with timeout:
            timeout.restart(0.02)
            await asyncio.sleep(60)

    run(work())
