"""Keeps a Mac from idle sleep while requests, conversions or downloads run."""

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from core.settings import Settings
from core.supervision import Supervisor, attempt, call_in_thread
from scheduler.sensors.macos import read_battery

logger = logging.getLogger(__name__)

POLL_S = 5.0
# An agent's next request often follows after a short pause.
LINGER_S = 60.0
# The share of the battery up to which the machine may sleep all the same.
LEAST_CHARGE = 0.2
_CHARGE_INTERVAL_S = 60.0
_END_LIMIT_S = 2.0
_CAFFEINATE = ("/usr/bin/caffeinate", "-i", "-w")


class SleepBlocker(Protocol):
    """Something that keeps the system awake while it is held."""

    @property
    def is_held(self) -> bool:
        """Whether the system is kept awake now."""
        ...

    def hold(self) -> None:
        """Keep the system awake; blocks for milliseconds.  Raises OSError."""
        ...

    def release(self) -> None:
        """Let the system sleep; idempotent, blocks for milliseconds."""
        ...


class Caffeinate:
    """Holds an assertion against idle sleep, not against a closed lid, in a process of its own.

    Source: caffeinate(8): -i prevents idle sleep, -w ends it when this process does.
    """

    def __init__(self, command: Sequence[str] = _CAFFEINATE) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_held(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def hold(self) -> None:
        """Start the process, if it does not run."""
        if not self.is_held:
            self._process = subprocess.Popen(
                [*self._command, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def release(self) -> None:
        """End the process and wait for it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class AwakeKeeper:
    """Holds a sleep blocker while there is work, and a minute longer; not on a low battery."""

    def __init__(
        self,
        is_busy: Callable[[], bool],
        blocker: SleepBlocker,
        charge: Callable[[], float | None] = read_battery,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`charge` returns the battery's charge, 0 to 1, or None on mains power; it may block."""
        self._is_busy = is_busy
        self._blocker = blocker
        self._charge = charge
        self._clock = clock
        self._busy_at: float | None = None
        self._charge_at: float | None = None
        self._has_charge = True

    async def run(self) -> None:
        """Look every few seconds until cancelled; then let the system sleep."""
        try:
            while True:
                await attempt(self.look)
                await asyncio.sleep(POLL_S)
        finally:
            self._blocker.release()

    async def look(self) -> None:
        """Hold or release once."""
        now = self._clock()
        if self._is_busy():
            self._busy_at = now
        has_work = self._busy_at is not None and now - self._busy_at < LINGER_S
        wanted = has_work and await self._may_use_power(now)
        if wanted and not self._blocker.is_held:
            await call_in_thread("impetus-awake", self._blocker.hold)
        elif not wanted and self._blocker.is_held:
            await call_in_thread("impetus-awake", self._blocker.release)

    async def _may_use_power(self, now: float) -> bool:
        """Return whether the machine is on mains power, or its battery is not low."""
        if self._charge_at is None or now - self._charge_at >= _CHARGE_INTERVAL_S:
            self._charge_at = now
            try:
                charge = await call_in_thread("impetus-battery", self._charge)
            except (OSError, ValueError, subprocess.SubprocessError) as problem:
                logger.debug("the battery's charge is unknown: %s", problem)
                charge = None
            self._has_charge = charge is None or charge > LEAST_CHARGE
        return self._has_charge


def keep_awake(supervisor: Supervisor, settings: Settings, is_busy: Callable[[], bool]) -> None:
    """Keep this Mac awake while `is_busy`; does nothing elsewhere, or if the setting is never.

    `is_busy` is asked every few seconds, on the running loop.
    """
    if sys.platform != "darwin" or settings.keep_awake == "never":
        return
    keeper = AwakeKeeper(is_busy, Caffeinate())
    policy = replace(supervisor.policy, is_vital=False)
    supervisor.keep_running("sleep blocker", keeper.run, policy)
