"""RAM store for the state of prefixes evicted from the KV cells, with LRU eviction."""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.match import common_prefix, longest_prefix

# Recomputing fewer tokens is cheaper than copying their state out and back.
SMALLEST_PREFIX = 32


@dataclass(slots=True, eq=False)
class RamPrefix:
    """The runtime's state after `tokens`: uint8, one dimension."""

    tokens: "array[int]"
    state: NDArray[np.uint8]
    used_at_step: int


class RamPrefixStore:
    """Stores at most `limit_bytes` of prefix states; used from the engine's thread only."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._prefixes: list[RamPrefix] = []

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        return sum(prefix.state.nbytes for prefix in self._prefixes)

    def tokens(self) -> list["array[int]"]:
        """Return the tokens of all prefixes."""
        return [prefix.tokens for prefix in self._prefixes]

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether a prefix of this size can be stored at all."""
        return size_bytes <= self._limit_bytes

    def covers(self, tokens: "array[int]") -> bool:
        """Whether a stored prefix starts with all of `tokens`."""
        return any(common_prefix(prefix.tokens, tokens) == len(tokens) for prefix in self._prefixes)

    def put(self, prefix: RamPrefix) -> None:
        """Store a prefix; drop those that it extends, and the oldest ones over the limit."""
        self._prefixes = [
            other
            for other in self._prefixes
            if common_prefix(other.tokens, prefix.tokens) < len(other.tokens)
        ]
        self._prefixes.append(prefix)
        while self.size_bytes > self._limit_bytes:
            oldest = min(self._prefixes, key=lambda other: other.used_at_step)
            self._prefixes.remove(oldest)

    def longest(self, prompt: "array[int]", *, whole_beyond: int) -> tuple[RamPrefix | None, int]:
        """Return the stored prefix with the longest match; see `longest_prefix`."""
        return longest_prefix(self._prefixes, prompt, whole_beyond)

    def clear(self) -> None:
        """Drop all prefixes."""
        self._prefixes.clear()
