"""Pauses and resumes child processes of background work with SIGSTOP and SIGCONT."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator


class PauseSwitch:
    """Stops the process groups it controls while it is on.  Belongs to one event loop.

    A stopped process keeps its memory and uses no CPU; SIGKILL still ends it.
    """

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._may_run = asyncio.Event()
        self._may_run.set()

    @property
    def is_on(self) -> bool:
        """Whether work is paused."""
        return not self._may_run.is_set()

    def switch(self, *, is_on: bool) -> None:
        """Pause or resume the work; does nothing if it already is in that state."""
        if is_on == self.is_on:
            return
        if is_on:
            self._may_run.clear()
        else:
            self._may_run.set()
        for group in self._groups:
            _signal(group, signal.SIGSTOP if is_on else signal.SIGCONT)

    async def wait_until_off(self) -> None:
        """Wait until work may run."""
        await self._may_run.wait()

    @contextlib.contextmanager
    def controlling(self, group: int) -> Iterator[None]:
        """Let the switch control a process group; if it is on, the group stops at once."""
        self._groups.add(group)
        if self.is_on:
            _signal(group, signal.SIGSTOP)
        try:
            yield
        finally:
            self._groups.discard(group)


def _signal(group: int, number: int) -> None:
    # The step may have exited just now.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
