"""Coalesces a request's events into frames for a router on another node."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

from deployments.transport.codec import StepEvents, encode_frames, lost_frame

# The first events are sent at once, later ones are collected this long.
_COALESCE_S = 0.02
_MAX_WAITING_STEPS = 16_384


class CoalescingReceiver:
    """Collects events on an event loop and yields them as frames."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[StepEvents | None] = asyncio.Queue()
        self._is_behind = False

    def deliver(self, batch: StepEvents) -> None:
        """Add a step's events.  Thread-safe; never raises."""
        # The loop may be closed at the process's end, when nobody reads any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._add, batch)

    def _add(self, batch: StepEvents) -> None:
        self._is_behind = self._is_behind or self._queue.qsize() >= _MAX_WAITING_STEPS
        if not self._is_behind:
            self._queue.put_nowait(batch)

    def end(self) -> None:
        """End `frames` after the events added so far."""
        self._loop.call_soon(self._queue.put_nowait, None)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the first frame at once, later ones at most every 20 ms.

        A router that falls 16,384 steps behind gets an error as the last frame.
        """
        sent_at = 0.0
        while (batch := await self._queue.get()) is not None:
            wait = sent_at + _COALESCE_S - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            batches, is_last = list(batch), False
            while not self._queue.empty():
                more = self._queue.get_nowait()
                if more is None:
                    is_last = True
                    break
                batches.extend(more)
            sent_at = time.monotonic()
            for frame in encode_frames(batches):
                yield frame
            if self._is_behind and batches:
                yield lost_frame(batches[0][0])
            if self._is_behind or is_last:
                return
