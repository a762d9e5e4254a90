"""Assigns llama.cpp sequence ids (slots) to rows, and keeps finished ones for reuse."""

import time
from array import array
from typing import Any

import numpy as np

from backends.base import EngineOptions
from backends.gguf.blocks import as_bytes
from backends.gguf.model import GgufModel, library
from backends.prefixes.match import Retained, RetainedPrefixes
from backends.prefixes.ram import SMALLEST_PREFIX, RamPrefix, RamPrefixStore
from backends.prefixes.transfer import PrefixTransfer

# At most so many prefixes move to RAM in one step, to keep running streams smooth.
_MAX_MOVES = 4


class KvSlots:
    """The slots (sequence ids) of one context; those of finished sequences are retained.

    Retained cells still cost time: attention reads every used cell of the unified cache.  So
    retained prefixes move to RAM, and back when a prompt continues one.  Blocks of them are also
    copied to `transfer`, which outlives the context.
    """

    def __init__(
        self,
        context: Any,
        count: int,
        store: RamPrefixStore,
        whole_beyond: int,
        transfer: PrefixTransfer[Retained],
    ) -> None:
        """Sequences longer than `whole_beyond` tokens are continued at their end only."""
        self._llama = library()
        self._context = context
        self._memory = self._llama.llama_get_memory(context)
        self._free = list(range(count))
        self._retained = RetainedPrefixes()
        self._store = store
        self._transfer = transfer
        self._whole_beyond = whole_beyond
        self.native_cpu_s = 0.0

    @property
    def retained_tokens(self) -> int:
        """Tokens of all retained prefixes, shared cells counted for each."""
        return sum(len(entry.tokens) for entry in self._retained.entries.values())

    def known(self) -> list["array[int]"]:
        """Return the tokens of all prefixes, in cells or in RAM."""
        retained = [entry.tokens for entry in self._retained.entries.values()]
        return [*retained, *self._store.tokens()]

    def longest(self, prompt: "array[int]") -> tuple[Retained | None, int]:
        """Return the retained prefix that shares most with `prompt`, and the shared length."""
        return self._retained.longest(prompt, whole_beyond=self._whole_beyond)

    def longest_stored(self, prompt: "array[int]") -> tuple[RamPrefix | None, int]:
        """Return the prefix in RAM that shares most with `prompt`, and the shared length."""
        return self._store.longest(prompt, whole_beyond=self._whole_beyond)

    def restore(self, prefix: RamPrefix, target: int, count: int, step: int) -> bool:
        """Copy the prefix's first `count` tokens into the empty slot `target`; False: no room."""
        state = prefix.state
        started = time.thread_time()
        read = self._llama.llama_state_seq_set_data(
            self._context, as_bytes(state), state.nbytes, target
        )
        self.native_cpu_s += time.thread_time() - started
        if not read:
            self._llama.llama_memory_seq_rm(self._memory, target, -1, -1)
            return False
        if count < len(prefix.tokens):
            self._llama.llama_memory_seq_rm(self._memory, target, count, -1)
        prefix.used_at_step = step
        return True

    def take_over(self, entry: Retained) -> int:
        """Return the entry's slot with its cells; the entry is no longer retained."""
        # The row that continues the cells has all of them kept when it ends.
        self._transfer.discard(entry)
        self._retained.forget(entry.slot)
        return entry.slot

    def take(self, *, but: Retained | None) -> int | None:
        """Return an empty slot, dropping the oldest entry if needed, `but` last; None: all run."""
        if not self._free:
            spared = None if but is None else but.slot
            oldest = self._retained.oldest(but=spared) or self._retained.oldest()
            if oldest is None:
                return None
            self._drop(oldest)
        return self._free.pop()

    def is_retained(self, entry: Retained) -> bool:
        """Whether the entry's cells still exist."""
        return self._retained.entries.get(entry.slot) is entry

    def share(self, source: int, target: int, count: int) -> None:
        """Share the first `count` tokens of `source` with `target`; no cell is copied."""
        self._llama.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def cut_to(self, entry: Retained, count: int) -> int:
        """Leave the entry's first `count` tokens in the cells, and move all else to RAM.

        Return its slot, which is no longer retained.
        """
        for other in list(self._retained.entries.values()):
            if other is not entry:
                self._drop(other)
        if count < len(entry.tokens):
            self._save(entry)
            self._llama.llama_memory_seq_rm(self._memory, entry.slot, count, -1)
        return self.take_over(entry)

    def empty(self) -> None:
        """Move all retained prefixes to RAM; the next row starts at the first cell."""
        while self.drop_oldest():
            pass
        self._llama.llama_memory_clear(self._memory, False)

    def keep_start(self, slot: int, tokens: "array[int]", count: int, step: int) -> None:
        """Retain the first `count` of a slot's tokens, or free it if it cannot be cut there."""
        is_kept = count == len(tokens)
        if 0 < count < len(tokens) <= self._whole_beyond:
            is_kept = self._llama.llama_memory_seq_rm(self._memory, slot, count, -1)
        if is_kept:
            self.keep(slot, tokens[:count], step)
        else:
            self.release(slot)

    def keep(self, slot: int, tokens: "array[int]", step: int) -> None:
        """Retain the slot with its tokens, or free it if there are none."""
        if tokens:
            self._transfer.queue(self._retained.keep(slot, tokens, step), tokens)
        else:
            self._free.append(slot)

    def release(self, slot: int) -> None:
        """Free a slot and its cells."""
        self._llama.llama_memory_seq_rm(self._memory, slot, -1, -1)
        self._free.append(slot)

    def clear(self) -> None:
        """Forget all retained prefixes, those in RAM too, and zero all cells."""
        for entry in list(self._retained.entries.values()):
            self._transfer.discard(entry)
            self._retained.forget(entry.slot)
            self._free.append(entry.slot)
        self._store.clear()
        self._llama.llama_memory_clear(self._memory, True)

    def drop_oldest(self) -> bool:
        """Move the least recently used retained prefix to RAM; False if there is none."""
        oldest = self._retained.oldest()
        if oldest is None:
            return False
        self._drop(oldest)
        return True

    def cool_down(self, warm_tokens: int) -> None:
        """Move retained prefixes to RAM until `warm_tokens` are left, at most 4 in a call."""
        for _ in range(_MAX_MOVES):
            if self.retained_tokens <= warm_tokens:
                return
            oldest = self._retained.oldest(spared=self._transfer.is_queued)
            if oldest is None:
                return
            self._drop(oldest)

    def _drop(self, entry: Retained) -> None:
        self._save(entry)
        self._transfer.discard(entry)
        self._retained.forget(entry.slot)
        self.release(entry.slot)

    def _save(self, entry: Retained) -> None:
        if len(entry.tokens) < SMALLEST_PREFIX or self._store.covers(entry.tokens):
            return
        size = int(self._llama.llama_state_seq_get_size(self._context, entry.slot))
        if not self._store.has_room_for(size):
            return
        state = np.empty(size, np.uint8)
        started = time.thread_time()
        written = self._llama.llama_state_seq_get_data(
            self._context, as_bytes(state), size, entry.slot
        )
        self.native_cpu_s += time.thread_time() - started
        if written == size:
            self._store.put(RamPrefix(entry.tokens, state, entry.used_at_step))


def count_slots(model: GgufModel, options: EngineOptions) -> int:
    """Return how many sequence ids a context needs, including one for copying blocks."""
    # Each id of a recurrent model has a full state; for other models ids are free.
    spare = 2 if model.keeps_recurrent_state else options.max_sequences + 16
    limit = int(library().llama_max_parallel_sequences())
    return min(options.max_sequences + spare + 1, limit)
