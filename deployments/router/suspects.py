"""Runs requests of which a process may have died one at a time, so that a death names its cause."""

import asyncio
from collections import defaultdict


class Turn:
    """The right to run a suspect; ended by its first token, or with its attempt."""

    def __init__(self, lock: asyncio.Lock | None = None) -> None:
        self._lock = lock

    def end(self) -> None:
        """Let the next suspect run; idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


class SuspectTurns:
    """One turn at a time for each format, whose models share a process; FIFO."""

    def __init__(self) -> None:
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def begin(self, format_name: str) -> Turn:
        """Wait for the turn; end it."""
        lock = self._locks[format_name]
        await lock.acquire()
        return Turn(lock)
