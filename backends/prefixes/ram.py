"""RAM store for the state of prefixes evicted from the KV cells, with LRU eviction."""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.match import common_prefix, longest_prefix

# Recomputing fewer tokens is cheaper than copying their state out and back.
SMALLEST_PREFIX = 32


@dataclass(slots=True, eq=False)
class Snapshot:
    """The runtime's state after `tokens`: uint8, one dimension."""

    tokens: "array[int]"
    state: NDArray[np.uint8]
    used_at_step: int


class PrefixStore:
    """Stores at most `limit_bytes` of prefix states; used from the engine's thread only."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._snapshots: list[Snapshot] = []

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        return sum(snapshot.state.nbytes for snapshot in self._snapshots)

    def tokens(self) -> list["array[int]"]:
        """Return the tokens of all prefixes."""
        return [snapshot.tokens for snapshot in self._snapshots]

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether a prefix of this size can be stored at all."""
        return size_bytes <= self._limit_bytes

    def covers(self, tokens: "array[int]") -> bool:
        """Whether a stored prefix starts with all of `tokens`."""
        return any(
            common_prefix(snapshot.tokens, tokens) == len(tokens) for snapshot in self._snapshots
        )

    def put(self, snapshot: Snapshot) -> None:
        """Store a prefix; drop those that it extends, and the oldest ones over the limit."""
        self._snapshots = [
            other
            for other in self._snapshots
            if common_prefix(other.tokens, snapshot.tokens) < len(other.tokens)
        ]
        self._snapshots.append(snapshot)
        while self.size_bytes > self._limit_bytes:
            oldest = min(self._snapshots, key=lambda other: other.used_at_step)
            self._snapshots.remove(oldest)

    def longest(self, prompt: "array[int]", *, whole_beyond: int) -> tuple[Snapshot | None, int]:
        """Return the stored prefix with the longest match; see `longest_prefix`."""
        return longest_prefix(self._snapshots, prompt, whole_beyond)

    def clear(self) -> None:
        """Drop all prefixes."""
        self._snapshots.clear()
