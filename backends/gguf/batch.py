"""A llama.cpp token batch (llama_batch) whose arrays are filled through numpy."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.model import library


class Batch:
    """At most `capacity` tokens, each of one sequence; reused for every step."""

    def __init__(self, capacity: int) -> None:
        llama = library()
        self.capacity = capacity
        self.count = 0
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._sequence_count = np.ones(capacity, np.int32)
        self._sequence = np.zeros(capacity, np.int32)
        self._wants_logits = np.zeros(capacity, np.int8)
        # llama.cpp reads a pointer to a list of sequence ids for each token.
        base = self._sequence.ctypes.data
        self._pointers = (np.arange(capacity, dtype=np.uint64) * 4 + base).astype(np.uint64)
        self.native = llama.llama_batch()
        self.native.token = self._as_pointer(self._token, ctypes.c_int32)
        self.native.pos = self._as_pointer(self._pos, ctypes.c_int32)
        self.native.n_seq_id = self._as_pointer(self._sequence_count, ctypes.c_int32)
        self.native.seq_id = ctypes.cast(
            self._pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
        )
        self.native.logits = self._as_pointer(self._wants_logits, ctypes.c_int8)

    @staticmethod
    def _as_pointer(array: "np.ndarray[Any, Any]", kind: Any) -> Any:
        return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

    def clear(self) -> None:
        """Empty the batch."""
        self.count = 0
        self.native.n_tokens = 0

    def add(self, sequence: int, start: int, token_ids: Sequence[int], *, logits: bool) -> int:
        """Append tokens of one sequence from position `start`; return the index of the last one.

        With `logits` the last token's logits are computed.
        """
        first, last = self.count, self.count + len(token_ids)
        self._token[first:last] = token_ids
        self._pos[first:last] = range(start, start + len(token_ids)) if last - first > 1 else start
        self._sequence[first:last] = sequence
        self._wants_logits[first:last] = 0
        self._wants_logits[last - 1] = logits
        self.count = last
        self.native.n_tokens = last
        return last - 1

    def want_logits(self, first: int, last: int) -> None:
        """Also compute the logits of the batch's tokens `first` to `last`, inclusive."""
        self._wants_logits[first : last + 1] = 1

    @contextmanager
    def vectors(self, vectors: NDArray[np.float32]) -> Iterator[None]:
        """Give llama.cpp these vectors (tokens, width) instead of the token ids."""
        tokens = self.native.token
        self.native.token = None
        self.native.embd = self._as_pointer(vectors, ctypes.c_float)
        try:
            yield
        finally:
            self.native.token, self.native.embd = tokens, None

    def want_all(self) -> None:
        """Request an output for every token, as embedding contexts need it."""
        self._wants_logits[: self.count] = 1
