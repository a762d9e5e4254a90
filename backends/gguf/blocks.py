"""Exports and imports blocks of KV cells as bytes, through a reserved sequence id."""

import ctypes
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineOptions
from backends.gguf.model import GgufModel, flash_attention, library, native_log
from backends.prefixes.block_file import BLOCK_TOKENS

# What llama.cpp logs when it finds no place for a state; any other error is a refusal.
_NO_ROOM_IN_LOG = ("available cells", "enough cells")


def block_layout(model: GgufModel, options: EngineOptions) -> str | None:
    """Return what a block's bytes depend on besides the model's files.

    None if cells cannot be split: for recurrent states, and sliding windows shorter than the
    context.
    """
    import llama_cpp

    assert options.context_tokens is not None
    assert options.kv_tokens is not None
    if model.whole_beyond < options.context_tokens:
        return None
    cells = options.kv_type or "f16"
    parts = (
        f"llama-cpp-python {llama_cpp.__version__} {sys.platform}",
        f"keys {cells}, values {cells}, flash attention {flash_attention(options)}",
        f"rope {_rope_variant(model, options.kv_tokens)}",
        f"{BLOCK_TOKENS} tokens",
    )
    return ", ".join(parts)


def _rope_variant(model: GgufModel, kv_tokens: int) -> str:
    """Return which rotation the keys have: LongRoPE selects its factors by the context's size.

    Source: llama.cpp llama_model::get_rope_factors.
    """
    architecture = model.metadata("general.architecture")
    original = model.metadata(f"{architecture}.rope.scaling.original_context_length")
    if not original.isdecimal():
        return "fixed"
    return "long" if kv_tokens > int(original) else "short"


class CellBlocks:
    """Copies blocks out of a context and into it; `scratch` is the reserved sequence id."""

    def __init__(self, context: Any, scratch: int) -> None:
        self._llama = library()
        self._context = context
        self._memory = self._llama.llama_get_memory(context)
        self._scratch = scratch
        self.lacks_room: bool | None = None
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
        """Append a block to a slot; False if no cells are free or llama.cpp refuses the block.

        `lacks_room` then tells which of the two llama.cpp logged, None if it logged nothing.
        """
        started = time.thread_time()
        # Lines of an earlier call, such as a batch that found no cells, say nothing of this one.
        native_log.take_own_errors()
        read = self._llama.llama_state_seq_set_data(
            self._context, as_bytes(state), state.nbytes, self._scratch
        )
        if read:
            self._llama.llama_memory_seq_cp(self._memory, self._scratch, slot, -1, -1)
        else:
            errors = native_log.take_own_errors()
            self.lacks_room = any(each in errors for each in _NO_ROOM_IN_LOG) if errors else None
        self._clear()
        self.native_cpu_s += time.thread_time() - started
        return bool(read)

    def _clear(self) -> None:
        self._llama.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)


def as_bytes(state: NDArray[np.uint8]) -> Any:
    """Return a pointer to the state's bytes."""
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
