"""The queue of waiting requests: its bound, its order, and the Retry-After estimate."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from backends.engine.request import EngineRequest
from core.errors import QueueFull, QueueTooShort
from core.types import BATCH_DELAY_S, GenerationRequest, RequestGroup

_FIRST_GUESS_S = 5.0
_NEW_SHARE = 0.2
_LONGEST_RETRY_S = 120
# The sequences of a group arrive within milliseconds; those of a router that died never do.
_ARRIVAL_S = 10.0


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

    def refusal(
        self, waiting: int, slots: int, name: str, *, most: int = 0, size: int = 1
    ) -> QueueFull:
        """Return the error for a request when `waiting` others already wait.

        `size` is the number of its sequences, `most` how many may run and wait at once.
        """
        retry_after_s = self.retry_after_s(waiting, slots)
        if size > max(most, 1):
            return QueueTooShort(
                f"The request has {size} sequences (prompts times n), and at most {most} of "
                f"{name} run and wait at once. Lower n, or raise IMPETUS_MAX_WAITING.",
                param="n",
                retry_after_s=retry_after_s,
            )
        full = f"The queue of {name} is full: {waiting} requests already wait"
        needs = "" if size == 1 else f", and this one has {size} sequences"
        return QueueFull(
            f"{full}{needs}. Try again in {retry_after_s} s.", retry_after_s=retry_after_s
        )


@dataclass(slots=True)
class _Group:
    """The decision for a group, `due` of whose sequences have not arrived; `until` a time."""

    is_admitted: bool
    due: int
    until: float


class Admission:
    """Decides which requests may run or wait, so that no group starts that does not fit whole.

    The first sequence of a group decides for all; the places of the others are kept until they
    have arrived, one of them has failed, or 10 s have passed.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._groups: dict[str, _Group] = {}

    def admits(self, request: GenerationRequest, taken: int, slots: int, now: float) -> bool:
        """Return whether a request may run or wait, beside `taken` others, on `slots` slots."""
        if request.generated:
            # A resumed request was admitted before.
            return True
        group = request.group
        for name in [name for name, each in self._groups.items() if each.until <= now]:
            del self._groups[name]
        known = None if group is None else self._groups.get(group.id)
        if group is None or known is None:
            return self._decide(group, taken, slots, now)
        known.due -= 1
        if known.due <= 0:
            del self._groups[group.id]
        return known.is_admitted

    def give_up(self, request: GenerationRequest) -> None:
        """Free the places that are kept for the rest of a group: one of it failed or left."""
        known = None if request.group is None else self._groups.get(request.group.id)
        if known is not None:
            known.is_admitted = False

    def _decide(self, group: RequestGroup | None, taken: int, slots: int, now: float) -> bool:
        size = 1 if group is None else group.size
        kept = sum(each.due for each in self._groups.values() if each.is_admitted)
        is_admitted = taken + kept + size <= slots + self.max_waiting
        if group is not None and size > 1:
            self._groups[group.id] = _Group(is_admitted, size - 1, now + _ARRIVAL_S)
        return is_admitted


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
