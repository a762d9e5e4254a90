"""Background work that can be held up: process groups are stopped and go on where they were."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator


class PauseSwitch:
    """Stops the process groups it covers while it is on.  Belongs to one event loop.

    A stopped process keeps its memory and uses no processor; SIGKILL ends it all the same.
    """

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._may_run = asyncio.Event()
        self._may_run.set()

    @property
    def is_on(self) -> bool:
        """Whether work is held up."""
        return not self._may_run.is_set()

    def switch(self, *, is_on: bool) -> None:
        """Hold work up, or let it go on; what is so already stays so."""
        if is_on == self.is_on:
            return
        if is_on:
            self._may_run.clear()
        else:
            self._may_run.set()
        for group in self._groups:
            _signal(group, signal.SIGSTOP if is_on else signal.SIGCONT)

    async def wait_until_off(self) -> None:
        """Return once work may run."""
        await self._may_run.wait()

    @contextlib.contextmanager
    def controlling(self, group: int) -> Iterator[None]:
        """Let the switch act on a process group, at once where it is on."""
        self._groups.add(group)
        if self.is_on:
            _signal(group, signal.SIGSTOP)
        try:
            yield
        finally:
            self._groups.discard(group)


def _signal(group: int, number: int) -> None:
    # A step may have ended a moment ago.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
