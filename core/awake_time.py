"""Timers and timeouts that do not count the time for which the machine slept.

On macOS uvloop's clock, and with it asyncio's timers, goes on while the machine sleeps, so on
waking every limit that a request has is over at once; Python's `time.monotonic` stands still.
Source: libuv, uv__hrtime of darwin: mach_continuous_time; CPython: mach_absolute_time.  On Linux
both stand still.
"""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Clocks are read one after the other, so an exact comparison would set a timer for nothing.
_NEGLIGIBLE_S = 0.002


class AwakeTimer:
    """Calls back once after some seconds awake; for one event loop."""

    def __init__(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Start on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._end = time.monotonic() + delay_s
        self._callback = callback
        self._arguments = arguments
        self._handle = self._loop.call_later(delay_s, self._ring)

    def cancel(self) -> None:
        """Never call back; idempotent."""
        self._handle.cancel()

    def _ring(self) -> None:
        left_s = self._end - time.monotonic()
        if left_s > _NEGLIGIBLE_S:
            # The loop's clock went on while the machine slept.
            self._handle = self._loop.call_later(left_s, self._ring)
        else:
            self._callback(*self._arguments)


class AwakeTimeout:
    """Like `asyncio.timeout`: cancels the body and raises TimeoutError, after seconds awake."""

    def __init__(self, limit_s: float | None) -> None:
        """None: no limit.  The time counts from `async with`."""
        self._limit_s = limit_s
        self._timeout = asyncio.timeout(None)
        self._timer: AwakeTimer | None = None

    async def __aenter__(self) -> "AwakeTimeout":
        await self._timeout.__aenter__()
        if self._limit_s is not None:
            self.restart(self._limit_s)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, problem, trace)

    def restart(self, limit_s: float) -> None:
        """Count `limit_s` from now; nothing happens if the time is over already."""
        if self.expired():
            return
        if self._timer is not None:
            self._timer.cancel()
        if limit_s <= 0:
            self._expire()
        else:
            self._timer = AwakeTimer(limit_s, self._expire)

    def expired(self) -> bool:
        """Return whether the body was cancelled because its time was over."""
        return self._timeout.expired()

    def _expire(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())
