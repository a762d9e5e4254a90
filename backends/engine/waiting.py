"""The queue of waiting requests, interactive before batch, and the Retry-After estimate."""

import math
from collections import deque
from collections.abc import Iterable, Iterator

from backends.engine.request import EngineRequest
from core.errors import QueueFull
from core.types import BATCH_DELAY_S

_FIRST_GUESS_S = 5.0
_NEW_SHARE = 0.2
_LONGEST_RETRY_S = 120


class Pace:
    """Estimates how fast requests finish: a moving average of their run times."""

    def __init__(self) -> None:
        self._each_s = _FIRST_GUESS_S

    def note(self, run_s: float) -> None:
        """Record how long a request ran, without the time it waited."""
        self._each_s += _NEW_SHARE * (run_s - self._each_s)

    def retry_after_s(self, waiting: int, slots: int) -> int:
        """Return the estimated seconds until a place in the queue is free, 1 to 120."""
        left_s = self._each_s * max(waiting, 1) / max(slots, 1) / 2
        return max(1, min(math.ceil(left_s), _LONGEST_RETRY_S))

    def refusal(self, waiting: int, slots: int, name: str) -> QueueFull:
        """Return the error for a request when `waiting` others already wait."""
        retry_after_s = self.retry_after_s(waiting, slots)
        message = (
            f"The queue of {name} is full: {waiting} requests already wait. "
            f"Try again in {retry_after_s} s."
        )
        return QueueFull(message, retry_after_s=retry_after_s)


class WaitingQueue:
    """FIFO per class; batch requests are ordered as if they had arrived 30 s later.

    So they wait behind interactive requests of the same time, but are never starved.
    """

    def __init__(self) -> None:
        self._interactive: deque[EngineRequest] = deque()
        self._batch: deque[EngineRequest] = deque()

    def __len__(self) -> int:
        return len(self._interactive) + len(self._batch)

    def __iter__(self) -> Iterator[EngineRequest]:
        yield from self._interactive
        yield from self._batch

    def extend(self, requests: Iterable[EngineRequest]) -> None:
        """Append requests in their order of arrival."""
        for request in requests:
            self._queue_of(request).append(request)

    def popleft(self) -> EngineRequest:
        """Remove and return the next request to run.  Raises IndexError when empty."""
        if not (self._interactive and self._batch):
            return (self._interactive or self._batch).popleft()
        goes_batch = self._batch[0].submitted_at + BATCH_DELAY_S < self._interactive[0].submitted_at
        return (self._batch if goes_batch else self._interactive).popleft()

    def discard(self, request: EngineRequest) -> None:
        """Remove a request if it is in the queue."""
        queue = self._queue_of(request)
        if request in queue:
            queue.remove(request)

    def clear(self) -> None:
        """Remove all requests."""
        self._interactive.clear()
        self._batch.clear()

    def _queue_of(self, request: EngineRequest) -> "deque[EngineRequest]":
        return self._batch if request.generation.priority == "batch" else self._interactive
