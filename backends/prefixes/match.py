"""Which computed prefixes exist in a KV cache, and the longest one a prompt shares."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np


def common_prefix(left: "array[int]", right: "array[int]") -> int:
    """Return how many leading tokens two sequences share."""
    length = min(len(left), len(right))
    if length == 0:
        return 0
    differs = np.frombuffer(left, np.int32, length) != np.frombuffer(right, np.int32, length)
    first = int(differs.argmax())
    return first if differs[first] else length


def token_array(token_ids: Sequence[int]) -> "array[int]":
    """Return token ids as int32."""
    return array("i", token_ids)


class HasTokens(Protocol):
    """Something computed for a sequence of tokens."""

    tokens: "array[int]"


Entry = TypeVar("Entry", bound=HasTokens)


def longest_prefix(
    entries: Iterable[Entry], prompt: "array[int]", whole_beyond: int
) -> tuple[Entry | None, int]:
    """Return the entry that shares most with `prompt`, and how many tokens.

    An entry of more than `whole_beyond` tokens counts only where all of them are shared.
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
    """A finished sequence whose KV cells stay until somebody needs them."""

    slot: int
    tokens: "array[int]"
    used_at_step: int


@dataclass(slots=True)
class RetainedPrefixes:
    """The finished sequences' prefixes, dropped least-recently-used."""

    entries: dict[int, Retained] = field(default_factory=dict)

    def keep(self, slot: int, tokens: "array[int]", step: int) -> Retained:
        """Remember what `slot` holds."""
        entry = self.entries[slot] = Retained(slot, tokens, step)
        return entry

    def longest(self, prompt: "array[int]", *, whole_beyond: int) -> tuple[Retained | None, int]:
        """Return the entry that shares most with `prompt`; see `longest_prefix`."""
        return longest_prefix(self.entries.values(), prompt, whole_beyond)

    def forget(self, slot: int) -> None:
        """Drop the entry of `slot`."""
        del self.entries[slot]

    def oldest(
        self, *, but: int | None = None, spared: Callable[[Retained], bool] = lambda _: False
    ) -> Retained | None:
        """Return the least recently used entry, neither that of slot `but` nor a `spared` one."""
        candidates = [
            entry for entry in self.entries.values() if entry.slot != but and not spared(entry)
        ]
        return min(candidates, key=lambda entry: entry.used_at_step, default=None)
