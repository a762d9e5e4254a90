"""Versions the published model states and lets routers wait for a change (long polling)."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from deployments.messages import ModelStates


class PublishedStates:
    """The last published model states.  Belongs to one event loop; any number may wait.

    `read` returns the states of this moment, `expires_in_s` the seconds until time alone changes
    them (None: it does not).
    """

    def __init__(
        self,
        read: Callable[[], ModelStates],
        expires_in_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._read = read
        self._expires_in_s = expires_in_s
        # Based on the time, so that a restarted scheduler repeats no version.
        self._last = ModelStates(version=time.time_ns())
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Wake those that wait, to compare the states; cheap where nobody waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    def current(self) -> ModelStates:
        """Return the states of this moment, with a new version where they changed."""
        version = self._last.version
        found = replace(self._read(), version=version)
        if found != self._last:
            self._last = replace(found, version=version + 1)
        return self._last

    async def wait(self, known_version: int, limit_s: float) -> ModelStates:
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
