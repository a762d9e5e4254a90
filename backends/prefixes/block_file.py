"""File format of one prefix block: fingerprint, token ids, and the runtime's state bytes."""

import os
import struct
import zlib
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.files import NotARegularFile, open_regular, write_atomically

# Tokens per block, the unit of lookup, copying, writing and eviction.
BLOCK_TOKENS = 128
KEY_BYTES = 16
FINGERPRINT_BYTES = 32
# First part of a fingerprint: the version of the model's files; the rest is the cache's layout.
VERSION_BYTES = 16
# Parent key of the first block of a prompt.
ROOT = bytes(KEY_BYTES)
SUFFIX = ".block"

_MAGIC = b"IMPETUS\x01"
# Magic, fingerprint, parent, block number, tokens, bytes of state, checksum of the state.
_HEAD = struct.Struct(f"<8s{FINGERPRINT_BYTES}s{KEY_BYTES}sIIQI")
_CHECKSUM = struct.Struct("<I")
_TOKEN_BYTES = 4
_HEAD_BYTES = _HEAD.size + BLOCK_TOKENS * _TOKEN_BYTES + _CHECKSUM.size


class DamagedBlock(Exception):
    """The file is not a complete, intact block."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockHead:
    """A block's metadata, without its state; `number` is its index within the prompt."""

    fingerprint: bytes
    parent: bytes
    number: int
    tokens: "array[int]"
    state_bytes: int
    state_checksum: int

    @property
    def key(self) -> bytes:
        """The key of the block in the index, and its file name."""
        return block_key(self.parent, self.tokens)

    def is_same_block(self, other: "BlockHead") -> bool:
        """Whether both are the same block; their states may differ by rounding."""
        return (
            self.fingerprint == other.fingerprint
            and self.parent == other.parent
            and self.tokens == other.tokens
            and self.state_bytes == other.state_bytes
        )


def block_key(parent: bytes, tokens: "array[int]") -> bytes:
    """Return the key of the block with `tokens` that follows the block `parent`."""
    return blake2b(parent + tokens.tobytes(), digest_size=KEY_BYTES).digest()


def block_keys(tokens: "array[int]") -> list[bytes]:
    """Return the keys of all full blocks of a prompt; each depends on all blocks before it."""
    keys, parent = [], ROOT
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        parent = block_key(parent, tokens[end - BLOCK_TOKENS : end])
        keys.append(parent)
    return keys


def block_head(
    fingerprint: bytes, parent: bytes, number: int, tokens: "array[int]", state: NDArray[np.uint8]
) -> BlockHead:
    """Return the head of a block with this state; reads the whole state for its checksum."""
    return BlockHead(fingerprint, parent, number, tokens, state.nbytes, zlib.crc32(state.data))


def file_bytes(head: BlockHead) -> int:
    """Return the size of the block's file in bytes."""
    return _HEAD_BYTES + head.state_bytes


def write_block(path: Path, head: BlockHead, state: NDArray[np.uint8]) -> None:
    """Write a block atomically: `path` is complete or unchanged, even if the process is killed.

    Does not call fsync: after a power loss the file may be short or empty, which its length and
    checksums detect.  Raises OSError; no temporary file is left then.
    """
    fixed = _HEAD.pack(
        _MAGIC,
        head.fingerprint,
        head.parent,
        head.number,
        len(head.tokens),
        head.state_bytes,
        head.state_checksum,
    )
    front = fixed + head.tokens.tobytes()
    parts = (front, _CHECKSUM.pack(zlib.crc32(front)), state.data)
    write_atomically(path, *parts, scratch=scratch_path(path), is_durable=False)


def scratch_path(path: Path) -> Path:
    """Return the temporary file of this process that is renamed to `path`."""
    return path.with_suffix(f".{os.getpid()}.tmp")


def writer_of(scratch: Path) -> int | None:
    """Return the process id in a temporary file's name; None for any other name."""
    _, _, rest = scratch.name.partition(".")
    number, _, kind = rest.partition(".")
    return int(number) if kind == "tmp" and number.isdecimal() else None


def read_head(path: Path, limit_bytes: int | None = None) -> BlockHead:
    """Read a block's head without its state.

    Raises DamagedBlock, also for what is not a regular file or is larger than `limit_bytes`, and
    OSError.
    """
    with _open(path) as file:
        head = _read_head(file, path)
    if limit_bytes is not None and file_bytes(head) > limit_bytes:
        raise DamagedBlock(f"{path.name} has {file_bytes(head)} bytes; the limit is {limit_bytes}")
    return head


def _open(path: Path) -> BufferedReader:
    try:
        return open_regular(path)
    except NotARegularFile as problem:
        raise DamagedBlock(str(problem)) from problem


def _read_head(file: BufferedReader, path: Path) -> BlockHead:
    front = file.read(_HEAD_BYTES)
    size = os.fstat(file.fileno()).st_size
    if len(front) < _HEAD_BYTES:
        raise DamagedBlock(f"{path.name} is too short")
    (checksum,) = _CHECKSUM.unpack_from(front, _HEAD_BYTES - _CHECKSUM.size)
    if zlib.crc32(front[: -_CHECKSUM.size]) != checksum:
        raise DamagedBlock(f"the head of {path.name} is damaged")
    magic, fingerprint, parent, number, count, state_bytes, state_checksum = _HEAD.unpack_from(
        front
    )
    if magic != _MAGIC or count != BLOCK_TOKENS:
        raise DamagedBlock(f"{path.name} has another format version")
    if size != _HEAD_BYTES + state_bytes:
        raise DamagedBlock(f"{path.name} has {size} bytes, not {_HEAD_BYTES + state_bytes}")
    tokens = array("i", front[_HEAD.size : -_CHECKSUM.size])
    return BlockHead(fingerprint, parent, number, tokens, state_bytes, state_checksum)


def read_state(path: Path, head: BlockHead) -> NDArray[np.uint8]:
    """Read and verify the state of the block with this head.

    Another process may have written the block again, with other rounding.
    Raises DamagedBlock, OSError, MemoryError.
    """
    with _open(path) as file:
        current = _read_head(file, path)
        if not current.is_same_block(head):
            raise DamagedBlock(f"{path.name} is another block than it was")
        state = np.empty(current.state_bytes, np.uint8)
        count = file.readinto(state.data)
    if count != state.nbytes or zlib.crc32(state.data) != current.state_checksum:
        raise DamagedBlock(f"the state in {path.name} is damaged")
    return state
