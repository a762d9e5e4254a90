"""Finds the longest computed prefix of a prompt among sequences in the KV cache."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np


def common_prefix(left: "array[int]", right: "array[int]") -> int:
    """Return the length of the common prefix of two token sequences."""
    length = min(len(left), len(right))
    if length == 0:
        return 0
    differs = np.frombuffer(left, np.int32, length) != np.frombuffer(right, np.int32, length)
    first = int(differs.argmax())
    return first if differs[first] else length


def token_array(token_ids: Sequence[int]) -> "array[int]":
    """Return token ids as an int32 array."""
    return array("i", token_ids)


class HasTokens(Protocol):
    """An entry computed for a sequence of tokens."""

    tokens: "array[int]"


Entry = TypeVar("Entry", bound=HasTokens)


def longest_prefix(
    entries: Iterable[Entry], prompt: "array[int]", whole_beyond: int
) -> tuple[Entry | None, int]:
    """Return the entry with the longest common prefix with `prompt`, and its length in tokens.

    An entry of more than `whole_beyond` tokens counts only if all of its tokens match.
    """
    best, best_length = None, 0
    for entry in entries:
        length = common_prefix(entry.tokens, prompt)
        if length < len(entry.tokens) > whole_beyond:
            continue
        if length > best_length:
            best, best_length = entry, length
    return best, best_length


@dataclass(slots=True, eq=False)
class Retained:
    """A finished sequence whose KV cells are kept until they are needed."""

    slot: int
    tokens: "array[int]"
    used_at_step: int


@dataclass(slots=True)
class RetainedPrefixes:
    """Prefixes of finished sequences in the KV cache, evicted least recently used first."""

    entries: dict[int, Retained] = field(default_factory=dict)

    def keep(self, slot: int, tokens: "array[int]", step: int) -> Retained:
        """Register the tokens in the KV cells of `slot`."""
        entry = self.entries[slot] = Retained(slot, tokens, step)
        return entry

    def longest(self, prompt: "array[int]", *, whole_beyond: int) -> tuple[Retained | None, int]:
        """Return the entry with the longest common prefix; see `longest_prefix`."""
        return longest_prefix(self.entries.values(), prompt, whole_beyond)

    def forget(self, slot: int) -> None:
        """Remove the entry of `slot`."""
        del self.entries[slot]

    def oldest(
        self, *, but: int | None = None, spared: Callable[[Retained], bool] = lambda _: False
    ) -> Retained | None:
        """Return the least recently used entry, except that of slot `but` and `spared` ones."""
        candidates = [
            entry for entry in self.entries.values() if entry.slot != but and not spared(entry)
        ]
        return min(candidates, key=lambda entry: entry.used_at_step, default=None)
