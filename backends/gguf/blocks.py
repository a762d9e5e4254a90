"""Exports and imports blocks of KV cells as bytes, through a reserved sequence id."""

import ctypes
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.model import GgufModel, library
from backends.prefixes.block_file import BLOCK_TOKENS


def block_layout(model: GgufModel, context_tokens: int) -> str | None:
    """Return what a block's bytes depend on besides the model's files.

    None if cells cannot be split: for recurrent states, and sliding windows shorter than the
    context.
    """
    import llama_cpp

    if model.whole_beyond < context_tokens:
        return None
    return f"llama-cpp-python {llama_cpp.__version__}, cells f16, {BLOCK_TOKENS} tokens"


class CellBlocks:
    """Copies blocks out of a context and into it; `scratch` is the reserved sequence id."""

    def __init__(self, context: Any, scratch: int) -> None:
        self._llama = library()
        self._context = context
        self._memory = self._llama.llama_get_memory(context)
        self._scratch = scratch
        self.native_cpu_s = 0.0

    def copy(self, slot: int, number: int) -> NDArray[np.uint8]:
        """Return the bytes of one block of a slot's tokens.  Raises RuntimeError."""
        started = time.thread_time()
        start = number * BLOCK_TOKENS
        self._llama.llama_memory_seq_cp(
            self._memory, slot, self._scratch, start, start + BLOCK_TOKENS
        )
        size = int(self._llama.llama_state_seq_get_size(self._context, self._scratch))
        state = np.empty(size, np.uint8)
        written = self._llama.llama_state_seq_get_data(
            self._context, as_bytes(state), size, self._scratch
        )
        self._clear()
        self.native_cpu_s += time.thread_time() - started
        if written != size:
            raise RuntimeError(f"llama.cpp wrote {written} of {size} bytes")
        return state

    def restore(self, slot: int, state: NDArray[np.uint8]) -> bool:
        """Append a block to a slot; False if no cells are free or the block does not fit."""
        started = time.thread_time()
        read = self._llama.llama_state_seq_set_data(
            self._context, as_bytes(state), state.nbytes, self._scratch
        )
        if read:
            self._llama.llama_memory_seq_cp(self._memory, self._scratch, slot, -1, -1)
        self._clear()
        self.native_cpu_s += time.thread_time() - started
        return bool(read)

    def _clear(self) -> None:
        self._llama.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)


def as_bytes(state: NDArray[np.uint8]) -> Any:
    """Return a pointer to the state's bytes."""
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
