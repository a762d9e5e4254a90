"""llama.cpp's sequence ids of one context: who holds which KV cells, and whose are kept."""

from array import array
from typing import Any

from backends.gguf_model import library
from backends.prefix_cache import Retained, RetainedPrefixes


class KvSlots:
    """Slots are sequence ids.  A finished sequence's slot is retained until it is needed."""

    def __init__(self, context: Any, count: int) -> None:
        self._llama = library()
        self._memory = self._llama.llama_get_memory(context)
        self._free = list(range(count))
        self._retained = RetainedPrefixes()

    @property
    def retained_tokens(self) -> int:
        """Tokens of all retained prefixes, shared cells counted for each."""
        return sum(len(entry.tokens) for entry in self._retained.entries.values())

    def longest(self, prompt: "array[int]", *, whole_only: bool) -> tuple[Retained | None, int]:
        """Return the retained prefix that shares most with `prompt`, and how many tokens."""
        return self._retained.longest(prompt, whole_only=whole_only)

    def take_over(self, entry: Retained) -> int:
        """Return the entry's slot with its cells; it is no longer retained."""
        self._retained.forget(entry.slot)
        return entry.slot

    def take(self, *, but: Retained | None) -> int | None:
        """Return an empty slot, dropping the oldest retained one, `but` last; None: all run."""
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
        """Let `target` have exactly the first `count` tokens of `source`; no cell is copied."""
        self._llama.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def keep(self, slot: int, tokens: "array[int]", step: int) -> None:
        """Retain what `slot` holds, or free the slot when that is nothing."""
        if tokens:
            self._retained.keep(slot, tokens, step)
        else:
            self._free.append(slot)

    def release(self, slot: int) -> None:
        """Give a slot's cells back."""
        self._llama.llama_memory_seq_rm(self._memory, slot, -1, -1)
        self._free.append(slot)

    def drop_oldest(self) -> bool:
        """Free the least recently used retained prefix; False when there is none."""
        oldest = self._retained.oldest()
        if oldest is None:
            return False
        self._drop(oldest)
        return True

    def _drop(self, entry: Retained) -> None:
        self._retained.forget(entry.slot)
        self.release(entry.slot)
