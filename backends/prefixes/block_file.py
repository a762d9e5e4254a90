"""File format of one prefix block: fingerprint, token ids, and the runtime's state bytes."""

import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Tokens per block, the unit of lookup, copying, writing and eviction.
BLOCK_TOKENS = 128
KEY_BYTES = 16
FINGERPRINT_BYTES = 32
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
    """Write a block atomically: `path` is complete or absent, even if the process is killed.

    Does not call fsync: after a power loss the file may be short or empty, which its length and
    checksums detect.  Raises OSError.
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
    scratch = scratch_path(path)
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(file, "wb", buffering=0) as out:
            _write_all(out.fileno(), [front, _CHECKSUM.pack(zlib.crc32(front)), state.data])
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _write_all(file: int, parts: Sequence[bytes | memoryview]) -> None:
    for part in parts:
        left = memoryview(part).cast("B")
        while left:
            left = left[os.write(file, left) :]


def scratch_path(path: Path) -> Path:
    """Return the temporary file of this process that is renamed to `path`."""
    return path.with_suffix(f".{os.getpid()}.tmp")


def writer_of(scratch: Path) -> int | None:
    """Return the process id in a temporary file's name; None for any other name."""
    _, _, rest = scratch.name.partition(".")
    number, _, kind = rest.partition(".")
    return int(number) if kind == "tmp" and number.isdecimal() else None


def read_head(path: Path) -> BlockHead:
    """Read a block's head without its state.  Raises DamagedBlock, OSError."""
    with path.open("rb") as file:
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
    """Read and verify the state of the block with this head.  Raises DamagedBlock, OSError."""
    with path.open("rb") as file:
        file.seek(_HEAD_BYTES)
        state = np.fromfile(file, np.uint8)
    if state.nbytes != head.state_bytes or zlib.crc32(state.data) != head.state_checksum:
        raise DamagedBlock(f"the state in {path.name} is damaged")
    return state
