"""Stores of computed prefixes for tests: small, and with a clock and a disk of their own."""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.disk import DiskLimits, PrefixFolder
from backends.prefixes.match import token_array
from backends.prefixes.store import BlockStore, ModelPrefixStore
from core.units import GIB, MIB


def folder_at(path: Path, size_bytes: int = 64 * MIB, **options: Any) -> PrefixFolder:
    """Return a folder with so much room on a disk that is nearly empty."""
    options.setdefault("free_bytes", lambda _: 1000 * GIB)
    daily = options.pop("daily_bytes", None)
    return PrefixFolder(path, DiskLimits(size_bytes, daily_bytes=daily), **options)


def store_at(path: Path, *, ram_bytes: int = 0, **options: Any) -> BlockStore:
    """Return a store over such a folder."""
    return BlockStore(folder_at(path, **options), ram_bytes)


def place_in(store: BlockStore, marks: str = "first version") -> ModelPrefixStore:
    """Return a model's place in the store."""
    return ModelPrefixStore(store, "model", marks)


def prompt_of(blocks: int, seed: int = 0, more: int = 0) -> "array[int]":
    """Return a prompt of so many whole blocks; those of one seed begin alike."""
    tokens = np.random.default_rng(seed).integers(3, 90, blocks * BLOCK_TOKENS + more)
    return token_array(tokens.tolist())


def state_of(number: int, size: int = 1000) -> NDArray[np.uint8]:
    """Return bytes that only this block has."""
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)
