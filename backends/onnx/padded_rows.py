"""Batched rows for ONNX decoders that return a new KV cache from each step.

Such graphs append to the cache that they are given, so rows of different lengths are padded on
the left, and the cache alternates between two buffers per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.engine.row_model import RowInput
from backends.onnx.blocks import cache_layout, pack_arrays, unpack_arrays
from backends.onnx.session import DecoderSession

_GROWTH_TOKENS = 256


@dataclass(slots=True, eq=False)
class _Batch:
    """Rows that are computed together.

    `cache` arrays are (rows, heads, columns, head_dim); row i's tokens start at `pads[i]`.
    `spares` are flat buffers for the next step's cache, `buffers` those of the current one.
    """

    rows: list[int]
    pads: NDArray[np.int64]
    columns: int
    cache: list[NDArray[Any]]
    spares: list[NDArray[Any]] = field(default_factory=list)
    buffers: list[NDArray[Any]] = field(default_factory=list)


class PaddedRows:
    """A `RowModel`; the decoding rows form one batch, rebuilt when rows join or leave."""

    def __init__(self, session: DecoderSession, *, max_rows: int) -> None:
        self._session = session
        self.max_rows = max_rows
        self.vocabulary_size = session.layout.vocabulary_size
        self._lengths: dict[int, int] = {}
        self._batch_of: dict[int, _Batch] = {}
        self._next_row = 0

    @property
    def native_cpu_s(self) -> float:
        """CPU seconds spent in onnxruntime."""
        return self._session.native_cpu_s

    def open_row(self, capacity: int) -> int:
        """Return an empty row; its memory grows with its tokens."""
        del capacity
        self._next_row += 1
        self._set_own_batch(self._next_row, 0, self._empty())
        return self._next_row

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        """Append tokens to rows; see `RowModel.extend`.

        Rows with one token are computed together if the graph takes positions and a mask.
        """
        can_batch = self._session.layout.is_batchable
        single = [index for index, item in enumerate(rows) if len(item.tokens) == 1 and can_batch]
        if len(single) == len(rows):
            return self._run(rows)
        logits = np.empty((len(rows), self.vocabulary_size), np.float32)
        if single:
            logits[single] = self._run([rows[index] for index in single])
        for index, item in enumerate(rows):
            if index not in single:
                logits[index] = self._prefill(item)
        return logits

    def _prefill(self, item: RowInput) -> NDArray[np.float32]:
        limit = self._session.chunk_tokens
        for start in range(0, len(item.tokens), limit):
            logits = self._run([RowInput(item.row, item.tokens[start : start + limit])])
        last: NDArray[np.float32] = logits[0]
        return last

    def extend_all(self, row: RowInput) -> NDArray[np.float32]:
        """Append tokens to a row; return the logits after each.  Raises EngineFailed."""
        return self._run([row], keeps_all=True)

    def _run(self, rows: Sequence[RowInput], *, keeps_all: bool = False) -> NDArray[np.float32]:
        """Append the same number of tokens to each row; on failure the rows are unchanged."""
        batch = self._gather([item.row for item in rows])
        count = len(rows[0].tokens)
        columns = batch.columns + count
        bindings = self._session.bindings()
        made: list[NDArray[Any]] = []
        for index, tensor in enumerate(self._session.layout.cache):
            bindings.feed(tensor.past, batch.cache[index])
            shape = (len(rows), tensor.heads, columns, tensor.head_dim)
            made.append(self._spare_array(batch, index, shape))
            bindings.receive(tensor.present, made[index])
        past = batch.columns - batch.pads
        mask = np.arange(columns)[None, :] >= batch.pads[:, None]
        tokens = [item.tokens for item in rows]
        logits = self._session.run(bindings, tokens, past, mask, keeps_all=keeps_all)
        batch.cache, batch.columns = made, columns
        batch.spares, batch.buffers = batch.buffers, batch.spares
        for item in rows:
            self._lengths[item.row] += count
        return logits

    def _spare_array(self, batch: _Batch, index: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return an array in the batch's spare buffer, which is enlarged if needed."""
        size = int(np.prod(shape))
        if index >= len(batch.spares):
            batch.spares.append(np.empty(0, self._session.cache_dtype))
        if batch.spares[index].size < size:
            room = size // shape[2] * (shape[2] + _GROWTH_TOKENS)
            batch.spares[index] = np.empty(room, self._session.cache_dtype)
        return batch.spares[index][:size].reshape(shape)

    def _gather(self, rows: list[int]) -> _Batch:
        """Return a batch of exactly these rows, built from their current batches."""
        batch = self._batch_of[rows[0]]
        if batch.rows == rows:
            return batch
        lengths = np.array([self._lengths[row] for row in rows], np.int64)
        columns = int(lengths.max())
        pads = columns - lengths
        cache = []
        for index, tensor in enumerate(self._session.layout.cache):
            # The mask hides padding, but a NaN in it would still propagate.
            joined = np.zeros(
                (len(rows), tensor.heads, columns, tensor.head_dim), self._session.cache_dtype
            )
            for place, row in enumerate(rows):
                joined[place, :, pads[place] :] = self._row_cache(row, index)
            cache.append(joined)
        self._detach_others(rows)
        batch = _Batch(rows, pads, columns, cache)
        for row in rows:
            self._batch_of[row] = batch
        return batch

    def _row_cache(self, row: int, index: int, length: int | None = None) -> NDArray[Any]:
        """Return a view of the first `length` tokens of a row: (heads, length, head_dim)."""
        batch = self._batch_of[row]
        place = batch.rows.index(row)
        start = int(batch.pads[place])
        end = batch.columns if length is None else start + length
        return batch.cache[index][place, :, start:end]

    def _detach_others(self, rows: Sequence[int]) -> None:
        """Copy the caches of other rows that share a batch with `rows`, so that it can be freed."""
        shared = {id(self._batch_of[row]): self._batch_of[row] for row in rows}
        for batch in shared.values():
            for row in batch.rows:
                if row not in rows and self._batch_of.get(row) is batch:
                    self._set_own_batch(
                        row, self._lengths[row], self._copy_cache(row, self._lengths[row])
                    )

    def _copy_cache(self, row: int, length: int) -> list[NDArray[Any]]:
        count = len(self._session.layout.cache)
        return [self._row_cache(row, index, length)[None].copy() for index in range(count)]

    def _empty(self) -> list[NDArray[Any]]:
        return [
            np.empty((1, tensor.heads, 0, tensor.head_dim), self._session.cache_dtype)
            for tensor in self._session.layout.cache
        ]

    def _set_own_batch(self, row: int, length: int, cache: list[NDArray[Any]]) -> None:
        """Make a row a batch of its own."""
        self._lengths[row] = length
        self._batch_of[row] = _Batch([row], np.zeros(1, np.int64), length, cache)

    def truncate(self, row: int, length: int) -> bool:
        """Keep the first `length` tokens of a row."""
        if length < self._lengths[row]:
            self._move_to_own_batch(row, self._copy_cache(row, length), length)
        return True

    def _move_to_own_batch(self, row: int, cache: list[NDArray[Any]], length: int) -> None:
        self._detach_others([row])
        self._set_own_batch(row, length, cache)

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        """Return a new row with the first `length` tokens of another."""
        if len(self._lengths) >= self.max_rows:
            return None
        row = self.open_row(capacity)
        self._set_own_batch(row, length, self._copy_cache(source, length))
        return row

    @property
    def layout(self) -> str:
        """What the bytes of `read_tokens` depend on besides the model's files."""
        return cache_layout(self._session)

    def read_tokens(self, row: int, start: int, count: int) -> NDArray[np.uint8]:
        """Return a copy of the keys and values of `count` tokens, as a flat array."""
        layers = range(len(self._session.layout.cache))
        return pack_arrays(
            self._row_cache(row, index)[:, start : start + count] for index in layers
        )

    def append_tokens(self, row: int, count: int, state: NDArray[np.uint8]) -> bool:
        """Append `count` tokens from `read_tokens`; False if `state` has another size.

        Copies the whole row, as does every computed chunk.
        """
        parts = unpack_arrays(self._session, count, state)
        if parts is None:
            return False
        joined = [
            np.concatenate((self._row_cache(row, index), part), axis=1)[None]
            for index, part in enumerate(parts)
        ]
        self._move_to_own_batch(row, joined, self._lengths[row] + count)
        return True

    def close_row(self, row: int) -> None:
        """Free a row's cache; a shared one is freed with the next step."""
        del self._lengths[row]
        del self._batch_of[row]

    def close(self) -> None:
        """Free caches and weights; twice is fine."""
        self._lengths.clear()
        self._batch_of.clear()
        self._session.close()
