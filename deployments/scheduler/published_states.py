"""Versions what the scheduler publishes and lets others wait for a change (long polling)."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Generic, TypeVar

from deployments.messages import MachineState, ModelStates

State = TypeVar("State", ModelStates, MachineState)


class PublishedStates(Generic[State]):
    """The last published states of one kind.  Belongs to one event loop; any number may wait.

    `read` returns the states of this moment, `expires_in_s` the seconds until time alone changes
    them (None: it does not).
    """

    def __init__(
        self,
        read: Callable[[], State],
        expires_in_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._read: Callable[[], State] = read
        self._expires_in_s = expires_in_s
        # Based on the time, so that a restarted scheduler repeats no version.
        self._version = time.time_ns()
        self._last: State | None = None
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Wake those that wait, to compare the states; cheap where nobody waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    def current(self) -> State:
        """Return the states of this moment, with a new version where they changed."""
        last = self._last
        found: State = replace(self._read(), version=self._version)
        if last is not None and found == last:
            return last
        self._version += 1
        self._last = found = replace(found, version=self._version)
        return found

    async def wait(self, known_version: int, limit_s: float) -> State:
        """Return the states once their version is not `known_version`, or after `limit_s`."""
        end = time.monotonic() + limit_s
        while True:
            states = self.current()
            left_s = end - time.monotonic()
            if states.version != known_version or left_s <= 0:
                return states
            expires_in_s = self._expires_in_s()
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait(),
                    left_s if expires_in_s is None else min(left_s, expires_in_s),
                )
