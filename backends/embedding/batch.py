"""Chooses which inputs of the queued embedding requests are computed in one batch."""

import asyncio
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.embedding.inputs import InputTokens
from backends.engine.request import resolve_future
from core.errors import ImpetusError
from core.types import Embeddings


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much fits into one batch; an input longer than `max_tokens` is computed alone.

    `max_tokens` bounds rows x longest row, because rows are padded; with `is_packed` it bounds
    the sum of the rows' lengths.  `max_rows` None means any number of rows.  With
    `equal_lengths` all rows are equally long, for models whose vectors depend on the padding.
    """

    max_tokens: int
    max_rows: int | None = None
    is_packed: bool = False
    equal_lengths: bool = False

    def longest_next(self, longest: int, rows: int, tokens: int) -> int:
        """Return the length that the next row may have; 0 when the batch is full.

        The batch holds `rows` rows of `tokens` tokens in all, the longest having `longest`.
        """
        if self.max_rows is not None and rows >= self.max_rows:
            return 0
        if not rows:
            return longest
        if self.is_packed:
            return max(self.max_tokens - tokens, 0)
        return longest if (rows + 1) * longest <= self.max_tokens else 0


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request for vectors or scores in the queue of its engine.

    `tokens` gives the token ids of each of `inputs`; it is iterated once, on another thread.
    `left` holds (length, index) of the inputs that are not computed yet, the shortest first.
    Until `due_at`, on the monotonic clock, requests that are due go first.  `begun_at` is when
    its first batch began.
    """

    inputs: Sequence[object]
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[Embeddings]"
    due_at: float = 0.0
    tokens: Iterable[InputTokens] = ()
    token_lists: list[list[int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    is_over: bool = False
    begun_at: float = math.inf
    request_id: str = ""

    @property
    def label(self) -> str:
        """Its name in the log."""
        return f"embedding request {self.request_id or 'without an id'}"

    def result(self) -> Embeddings:
        """Return the vectors in the order of the inputs."""
        rows = [self.vectors[index] for index in range(len(self.token_lists))]
        vectors = np.stack(rows) if rows else np.empty((0, 0), np.float32)
        cut = sum(ids.cut for ids in self.token_lists if isinstance(ids, InputTokens))
        return Embeddings(vectors, sum(map(len, self.token_lists)), cut)

    def resolve(self, outcome: Embeddings | ImpetusError) -> None:
        """Hand the result or the error to the waiting task; callable from any thread."""
        self.is_over = True
        resolve_future(self.loop, self.done, outcome)


Batch: TypeAlias = list[tuple[QueuedRequest, int]]


def next_batch(queue: deque[QueuedRequest], limits: BatchLimits, now: float) -> Batch:
    """Take the next batch out of `queue`: pairs of a request and the index of its input.

    The first request that is due contributes its longest input; the longest inputs that fit
    beside it follow, its own first.  Then the queue rotates, so that another request opens the
    next batch.
    """
    if not queue:
        return []
    _move_due_first(queue, now)
    longest = queue[0].left[-1][0]
    batch: Batch = []
    tokens = 0
    for request in queue:
        taken: list[int] = []
        while length := limits.longest_next(longest, len(batch) + len(taken), tokens):
            end = bisect_right(request.left, length, key=itemgetter(0))
            if not end:
                break
            if limits.equal_lengths and request.left[end - 1][0] != longest:
                break
            length, index = request.left.pop(end - 1)
            taken.append(index)
            tokens += length
        if taken:
            request.begun_at = min(request.begun_at, now)
            batch += [(request, index) for index in reversed(taken)]
    queue.rotate(-1)
    return batch


def _move_due_first(queue: deque[QueuedRequest], now: float) -> None:
    """Put the requests that are due before the others; the order is kept otherwise."""
    if queue[0].due_at > now:
        ordered = sorted(queue, key=lambda request: request.due_at > now)
        queue.clear()
        queue.extend(ordered)
