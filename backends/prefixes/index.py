"""In-memory index of a model's prefix blocks: finds the longest chain for a prompt."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.block_file import BLOCK_TOKENS, ROOT, BlockHead, block_keys
from backends.prefixes.match import common_prefix
from core.types import MissReason

# Keys of absent blocks to remember, to report why they are absent.
_MAX_DROPPED_KEYS = 65_536


@dataclass(slots=True, eq=False)
class Block:
    """The state of `tokens` given all tokens before them; in RAM, on disk, or both."""

    key: bytes
    parent: bytes
    number: int
    tokens: "array[int]"
    size_bytes: int
    state: NDArray[np.uint8] | None = None
    path: Path | None = None
    head: BlockHead | None = None


class BlockIndex:
    """The blocks of one version of one model; the caller holds the lock."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, list[Block]] = {}
        self._dropped: OrderedDict[bytes, MissReason] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def blocks(self) -> list[Block]:
        """Return all blocks."""
        return list(self._blocks.values())

    def keys(self) -> list[bytes]:
        """Return the keys of all blocks, and of those that are remembered as absent."""
        return [*self._blocks, *self._dropped]

    def has(self, block: Block) -> bool:
        """Whether this very block is known."""
        return self._blocks.get(block.key) is block

    def chain(self, tokens: "array[int]") -> list[Block]:
        """Return the longest chain of blocks at the start of `tokens`; compares every token."""
        found: list[Block] = []
        for number, key in enumerate(block_keys(tokens)):
            block = self._blocks.get(key)
            start = number * BLOCK_TOKENS
            if block is None or block.tokens != tokens[start : start + BLOCK_TOKENS]:
                break
            found.append(block)
        return found

    def add(self, block: Block) -> bool:
        """Add a block; return False if it is already known."""
        if block.key in self._blocks:
            return False
        self._blocks[block.key] = block
        self._children.setdefault(block.parent, []).append(block)
        self._dropped.pop(block.key, None)
        return True

    def drop(self, block: Block, reason: MissReason = "evicted") -> None:
        """Remove a block, and remember why."""
        if self._blocks.get(block.key) is not block:
            return
        del self._blocks[block.key]
        self._children[block.parent].remove(block)
        if not self._children[block.parent]:
            del self._children[block.parent]
        self.note_absent([block.key], reason)

    def note_absent(self, keys: Iterable[bytes], reason: MissReason) -> None:
        """Remember why blocks with these keys are not stored."""
        for key in keys:
            self._dropped[key] = reason
        while len(self._dropped) > _MAX_DROPPED_KEYS:
            self._dropped.popitem(last=False)

    def why_absent(self, tokens: "array[int]", number: int) -> MissReason:
        """Return why block `number` of this prompt is not stored."""
        keys = block_keys(tokens[: (number + 1) * BLOCK_TOKENS])
        if len(keys) <= number:
            return "no_snapshot"
        return self._dropped.get(keys[number], "no_snapshot")

    def nearest(self, tokens: "array[int]", count: int) -> tuple[int, "array[int]"]:
        """Return the longest common prefix with a known prompt in tokens, and how that continues.

        The first `count` blocks are known to match, so only their successors are compared.
        """
        start = count * BLOCK_TOKENS
        keys = block_keys(tokens[:start])
        rest = tokens[start : start + BLOCK_TOKENS]
        best, known = 0, array("i")
        for child in self._children.get(keys[-1] if keys else ROOT, ()):
            shared = common_prefix(child.tokens, rest)
            if shared > best or not known:
                best, known = shared, child.tokens[shared:]
        return start + best, known
