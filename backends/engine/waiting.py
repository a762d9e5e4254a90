"""The requests that wait for a slot in an engine, interactive ones before batch ones."""

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
    """How fast requests end, from those that did: the last ones count most."""

    def __init__(self) -> None:
        self._each_s = _FIRST_GUESS_S

    def note(self, run_s: float) -> None:
        """Take in how long a request ran once it had its slot."""
        self._each_s += _NEW_SHARE * (run_s - self._each_s)

    def retry_after_s(self, waiting: int, slots: int) -> int:
        """Return the whole seconds until a place in the queue is likely to be free."""
        left_s = self._each_s * max(waiting, 1) / max(slots, 1) / 2
        return max(1, min(math.ceil(left_s), _LONGEST_RETRY_S))

    def refusal(self, waiting: int, slots: int, name: str) -> QueueFull:
        """Return the error of a request that finds `waiting` others before it."""
        message = f"{waiting} requests already wait for {name}."
        return QueueFull(message, retry_after_s=self.retry_after_s(waiting, slots))


class WaitingQueue:
    """Each class in the order of arrival; a batch request goes as if it had come later.

    So it waits behind the interactive ones of its time, but not behind all that ever come.
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
        """Take requests in the order they came."""
        for request in requests:
            self._queue_of(request).append(request)

    def popleft(self) -> EngineRequest:
        """Return the next one to run.  Raises IndexError when nobody waits."""
        if not (self._interactive and self._batch):
            return (self._interactive or self._batch).popleft()
        goes_batch = self._batch[0].submitted_at + BATCH_DELAY_S < self._interactive[0].submitted_at
        return (self._batch if goes_batch else self._interactive).popleft()

    def discard(self, request: EngineRequest) -> None:
        """Drop a request, if it waits here."""
        queue = self._queue_of(request)
        if request in queue:
            queue.remove(request)

    def clear(self) -> None:
        """Drop all."""
        self._interactive.clear()
        self._batch.clear()

    def _queue_of(self, request: EngineRequest) -> "deque[EngineRequest]":
        return self._batch if request.generation.priority == "batch" else self._interactive
