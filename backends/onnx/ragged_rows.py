"""Batched rows for ONNX decoders with GroupQueryAttention, which update the KV cache in place.

That operator takes each row's length from the attention mask, and computes in place if past and
present are the same memory (onnxruntime, contrib_ops/cpu/bert/group_query_attention.cc).
The rows of a step are a slice of the cache, of which nothing is copied.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.engine.row_model import RowInput
from backends.onnx.blocks import cache_layout, pack_arrays, unpack_arrays
from backends.onnx.session import Bindings, DecoderSession
from core.errors import EngineFailed

_FIRST_CAPACITY = 256


def lazy_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array whose pages are allocated on first write."""
    size = max(math.prod(shape) * dtype.itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size, flags=flags)
    # A huge page would span the beginnings of many rows.
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # type: ignore[attr-defined,unused-ignore]
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


class RaggedRows:
    """A `RowModel` of slots with equal capacity; the decoding rows are kept adjacent."""

    def __init__(self, session: DecoderSession, *, max_rows: int, kv_tokens: int) -> None:
        """`kv_tokens` bounds the tokens that all rows keep in memory between requests."""
        self._session = session
        self._kv_tokens = kv_tokens
        self.max_rows = max_rows
        self.vocabulary_size = session.layout.vocabulary_size
        self._capacity = 0
        # Arrays (slots, heads, capacity, head_dim); pages without writes take no memory.
        self._cache: list[NDArray[Any]] = []
        self._lengths = np.zeros(max_rows, np.int64)
        self._touched = np.zeros(max_rows, np.int64)
        self._row_at: list[int] = [-1] * max_rows
        self._slot_of: dict[int, int] = {}
        self._next_row = 0
        self._decoding: tuple[int, Bindings] | None = None

    @property
    def native_cpu_s(self) -> float:
        """CPU seconds spent in onnxruntime."""
        return self._session.native_cpu_s

    @property
    def touched_tokens(self) -> int:
        """Number of tokens with allocated keys and values, including those of closed rows."""
        return int(self._touched.sum())

    def open_row(self, capacity: int) -> int:
        """Return an empty row; its memory grows with its tokens."""
        del capacity
        slot = self._row_at.index(-1)
        self._next_row += 1
        self._row_at[slot] = self._next_row
        self._slot_of[self._next_row] = slot
        self._lengths[slot] = 0
        kept = int(self._lengths.sum())
        if self.touched_tokens > max(self._kv_tokens, 2 * kept):
            self._allocate(self._capacity)
        return self._next_row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to rows; see `RowModel.extend`.

        Rows with one token are computed together, others one by one: the operator accepts
        several tokens after a past for a single row only.
        """
        single = [index for index, item in enumerate(rows) if len(item.tokens) == 1]
        order = self._move_to_front([rows[index].row for index in single])
        if order == list(range(len(rows))):
            return self._decode(order, rows)
        logits = np.empty((len(rows), self.vocabulary_size), np.float32)
        if single:
            places = [single[place] for place in order]
            logits[places] = self._decode(places, rows)
        for index, item in enumerate(rows):
            if len(item.tokens) > 1:
                logits[index] = self._prefill(item)
        return logits

    def _prefill(self, item: RowInput) -> NDArray[np.float32]:
        slot = self._slot_of[item.row]
        before = int(self._lengths[slot])
        self._reserve(before + len(item.tokens))
        limit = self._session.chunk_tokens
        try:
            for start in range(0, len(item.tokens), limit):
                logits = self._run(slot, [item.tokens[start : start + limit]])
        except EngineFailed:
            self._lengths[slot] = before
            raise
        last: NDArray[np.float32] = logits[0]
        return last

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return the logits after each.  Raises EngineFailed."""
        slot = self._slot_of[row.row]
        self._reserve(int(self._lengths[slot]) + len(row.tokens))
        return self._run(slot, [row.tokens], keeps_all=True)

    def _decode(self, order: list[int], rows: Sequence[RowInput]) -> NDArray[np.float32]:
        count = len(order)
        self._reserve(int(self._lengths[:count].max()) + 1)
        return self._run(0, [rows[index].tokens for index in order])

    def _run(
        self, first: int, tokens: Sequence[Sequence[int]], *, keeps_all: bool = False
    ) -> NDArray[np.float32]:
        """Append `tokens` to the slots starting at `first`."""
        count, new = len(tokens), len(tokens[0])
        past = self._lengths[first : first + count]
        after = past + new
        mask = np.arange(int(after.max()))[None, :] < after[:, None]
        bindings = self._cache_bindings(first, count, new)
        logits = self._session.run(bindings, tokens, past, mask, keeps_all=keeps_all)
        past += new
        touched = self._touched[first : first + count]
        np.maximum(touched, past, out=touched)
        return logits

    def _cache_bindings(self, first: int, count: int, new: int) -> Bindings:
        """Return bindings with the slots' part of the cache as both past and present."""
        is_decoding = first == 0 and new == 1
        if is_decoding and self._decoding is not None and self._decoding[0] == count:
            return self._decoding[1]
        bindings = self._session.bindings()
        for tensor, values in zip(self._session.layout.cache, self._cache, strict=True):
            part = values[first : first + count]
            bindings.feed(tensor.past, part)
            bindings.receive(tensor.present, part)
        if is_decoding:
            self._decoding = (count, bindings)
        return bindings

    def _move_to_front(self, rows: list[int]) -> list[int]:
        """Move `rows` into the first slots; return their indices in `rows` by slot."""
        count = len(rows)
        wanted = {self._slot_of[row] for row in rows}
        outside = sorted(slot for slot in wanted if slot >= count)
        for slot in range(count):
            if slot not in wanted:
                self._swap(slot, outside.pop())
        places = {row: place for place, row in enumerate(rows)}
        return [places[self._row_at[slot]] for slot in range(count)]

    def _swap(self, one: int, other: int) -> None:
        first, second = int(self._lengths[one]), int(self._lengths[other])
        for values in self._cache:
            held = values[one, :, :first].copy()
            values[one, :, :second] = values[other, :, :second]
            values[other, :, :first] = held
        self._lengths[[one, other]] = second, first
        self._touched[one] = max(int(self._touched[one]), second)
        self._touched[other] = max(int(self._touched[other]), first)
        rows = self._row_at
        rows[one], rows[other] = rows[other], rows[one]
        for slot in (one, other):
            if rows[slot] >= 0:
                self._slot_of[rows[slot]] = slot

    def _reserve(self, tokens: int) -> None:
        """Ensure a capacity of `tokens` in every slot."""
        if tokens <= self._capacity:
            return
        capacity = max(self._capacity, _FIRST_CAPACITY)
        while capacity < tokens:
            capacity *= 2
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        """Move the rows to larger arrays, one layer at a time to save memory."""
        self._decoding = None
        for index, tensor in enumerate(self._session.layout.cache):
            shape = (self.max_rows, tensor.heads, capacity, tensor.head_dim)
            fresh = lazy_array(shape, self._session.cache_dtype)
            if index < len(self._cache):
                for slot, length in enumerate(self._lengths):
                    fresh[slot, :, :length] = self._cache[index][slot, :, :length]
                self._cache[index] = fresh
            else:
                self._cache.append(fresh)
        self._capacity = capacity
        self._touched[:] = self._lengths

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens of a row."""
        slot = self._slot_of[row]
        self._lengths[slot] = min(length, int(self._lengths[slot]))
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row with the first `length` tokens of another."""
        if -1 not in self._row_at:
            return None
        row = self.open_row(capacity)
        one, other = self._slot_of[source], self._slot_of[row]
        for values in self._cache:
            values[other, :, :length] = values[one, :, :length]
        self._lengths[other] = length
        self._touched[other] = max(int(self._touched[other]), length)
        return row

    @property
    def layout(self) -> str:
        """What the bytes of `read_tokens` depend on besides the model's files."""
        return cache_layout(self._session)

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        """Return a copy of the keys and values of `count` tokens, as a flat array."""
        slot = self._slot_of[row]
        parts = (values[slot, :, start : start + count] for values in self._cache)
        return pack_arrays(parts)

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        """Append `count` tokens from `read_tokens`; False if `state` has another size."""
        parts = unpack_arrays(self._session, count, state)
        if parts is None:
            return False
        slot = self._slot_of[row]
        start = int(self._lengths[slot])
        self._reserve(start + count)
        for values, part in zip(self._cache, parts, strict=True):
            values[slot, :, start : start + count] = part
        self._lengths[slot] = start + count
        self._touched[slot] = max(int(self._touched[slot]), start + count)
        return True

    def close_row(self, row: int) -> None:
        """Free a row's slot; closing the last row frees the cache's memory."""
        slot = self._slot_of.pop(row)
        self._row_at[slot] = -1
        self._lengths[slot] = 0
        if not self._slot_of:
            self._release()

    def _release(self) -> None:
        self._decoding = None
        self._cache.clear()
        self._capacity = 0
        self._touched[:] = 0

    def close(self) -> None:
        """Free cache and weights; twice is fine."""
        self._release()
        self._session.close()
