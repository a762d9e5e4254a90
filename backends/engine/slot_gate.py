"""Slots that requests of one event loop wait for, interactive ones before batch ones."""

import asyncio
import heapq
import itertools
import time

from core.types import BATCH_DELAY_S, Priority


class SlotGate:
    """Like a semaphore, but a batch request waits as if it had come later."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def acquire(self, priority: Priority) -> None:
        """Return once a slot is the caller's, who must release it."""
        if self._free:
            self._free -= 1
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rank = time.monotonic() + (BATCH_DELAY_S if priority == "batch" else 0.0)
        heapq.heappush(self._waiting, (rank, next(self._numbers), future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a slot to the next who waits."""
        while self._waiting:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                return
        self._free += 1
