"""Keeps track of a stepper's rows: which wait, which run, and which is preempted next."""

from array import array
from collections.abc import Iterator
from typing import Generic, TypeVar

from backends.base import EngineLoad
from backends.engine.rows import Row
from backends.prefixes.match import common_prefix
from core.errors import RequestFailed

RowT = TypeVar("RowT", bound=Row)


class RowBook(Generic[RowT]):
    """The rows of one stepper, and its counters; used from the engine's thread only.

    The stepper owns the KV cache: it gives a row its slot before `start`, and frees the slot of
    a row that `remove` or `preempt` returned.  Rows start in the order of arrival, `running`
    has the youngest last.
    """

    def __init__(self, max_sequences: int, kv_tokens: int) -> None:
        """Run at most `max_sequences` rows in a KV cache of `kv_tokens`."""
        self.waiting: list[RowT] = []
        self.running: list[RowT] = []
        self.kv_tokens = kv_tokens
        self.steps = 0
        self.native_cpu_s = 0.0
        self._max_sequences = max_sequences
        self._preemptions = 0
        self._by_id: dict[int, RowT] = {}
        # Set by a preemption until a running row ends: a new row would not find room.
        self._is_crowded = False

    def add(self, row: RowT) -> None:
        """Let a new row wait behind all others."""
        self._by_id[row.spec.id] = row
        self.waiting.append(row)

    def admissible(self) -> Iterator[RowT]:
        """Yield the waiting rows in order, for as long as another one may run.

        The caller gives the row a slot and calls `start`, skips it, or ends the loop.
        """
        if not self.waiting or (self._is_crowded and self.running):
            return
        for row in list(self.waiting):
            if len(self.running) >= self._max_sequences:
                return
            yield row

    def start(self, row: RowT) -> None:
        """Let a waiting row run."""
        self.waiting.remove(row)
        self.running.append(row)

    def remove(self, sequence_id: int) -> RowT | None:
        """Forget a row and return it, None if it is not known; its slot is the caller's now."""
        row = self._by_id.pop(sequence_id, None)
        if row is None:
            return None
        row.stop_restoring()
        # A row that failed while it was placed may have a slot, but does not run yet.
        if row in self.running:
            self.running.remove(row)
            self._is_crowded = False
        else:
            self.waiting.remove(row)
        return row

    def too_long(self) -> RequestFailed | None:
        """Return the error of the only running row when it needs more room; None if others run."""
        if len(self.running) > 1:
            return None
        return RequestFailed(
            f"The sequence does not fit the KV cache of {self.kv_tokens} tokens. Shorten the "
            "prompt or max_tokens, or load the model with a larger context."
        )

    def preempt(self) -> RowT:
        """Let the youngest running row wait before all others, to be computed again.

        Its slot is the caller's now.  At least two rows must run: see `too_long`.
        """
        row = self.running.pop()
        row.stop_restoring()
        row.past, row.leader = 0, None
        self.waiting.insert(0, row)
        self._is_crowded = True
        self._preemptions += 1
        return row

    def restart_all(self) -> list[RowT]:
        """Let all running rows wait before all others, to be computed again; return them.

        Their slots are the caller's now.
        """
        rows = list(self.running)
        for row in rows:
            row.stop_restoring()
            row.past, row.leader = 0, None
        self.running.clear()
        self.waiting[:0] = rows
        self._preemptions += len(rows)
        return rows

    def best_leader(self, row: RowT) -> tuple[RowT | None, int]:
        """Return the running row that shares the longest prefix with `row`, and its length.

        The last token of `row` is left out: it must be computed to get logits.
        """
        best, best_length = None, 0
        limit = len(row.tokens) - 1
        for other in self.running:
            length = min(common_prefix(other.tokens, row.tokens), limit)
            if length > best_length:
                best, best_length = other, length
        return best, best_length

    @property
    def past_tokens(self) -> int:
        """Computed tokens of all running rows."""
        return sum(row.past for row in self.running)

    def running_tokens(self) -> list["array[int]"]:
        """Return the tokens of all running rows."""
        return [row.tokens for row in self.running]

    def load(self, used_tokens: int, native_cpu_s: float = 0.0) -> EngineLoad:
        """Return the counters; `native_cpu_s` is what the book itself did not count."""
        return EngineLoad(
            kv_used_tokens=min(used_tokens, self.kv_tokens),
            kv_tokens=self.kv_tokens,
            steps=self.steps,
            preemptions=self._preemptions,
            native_cpu_s=self.native_cpu_s + native_cpu_s,
        )

    def clear(self) -> list[RowT]:
        """Forget all rows and return them."""
        rows = list(self._by_id.values())
        self.waiting.clear()
        self.running.clear()
        self._by_id.clear()
        self._is_crowded = False
        return rows
