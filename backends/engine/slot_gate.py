"""A semaphore with priorities for requests of one event loop: interactive before batch."""

import asyncio
import heapq
import itertools
import time

from core.types import BATCH_DELAY_S, Priority


class SlotGate:
    """A semaphore; batch requests are ordered as if they had arrived 30 s later."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return self._free

    async def acquire(self, priority: Priority) -> None:
        """Wait for a slot; the caller must release it."""
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
        """Return a slot, which goes to the next waiting request."""
        while self._waiting:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                return
        self._free += 1
