"""One block of a computed prefix as a file: whose it is, its token ids, and the runtime's bytes."""

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

# Tokens of a block: what can be found, copied, written and dropped by itself.
BLOCK_TOKENS = 128
KEY_BYTES = 16
FINGERPRINT_BYTES = 32
# The parent of a first block.
ROOT = bytes(KEY_BYTES)
SUFFIX = ".block"

_MAGIC = b"IMPETUS\x01"
# Magic, fingerprint, parent, block number, tokens, bytes of state, checksum of the state.
_HEAD = struct.Struct(f"<8s{FINGERPRINT_BYTES}s{KEY_BYTES}sIIQI")
_CHECKSUM = struct.Struct("<I")
_TOKEN_BYTES = 4
_HEAD_BYTES = _HEAD.size + BLOCK_TOKENS * _TOKEN_BYTES + _CHECKSUM.size


class DamagedBlock(Exception):
    """A file that holds no whole block."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockHead:
    """What a block is, without its state; `number` counts from the prompt's beginning."""

    fingerprint: bytes
    parent: bytes
    number: int
    tokens: "array[int]"
    state_bytes: int
    state_checksum: int

    @property
    def key(self) -> bytes:
        """What the block is found by."""
        return chained(self.parent, self.tokens)


def chained(parent: bytes, tokens: "array[int]") -> bytes:
    """Return the key of the block of `tokens` that follows on `parent`."""
    return blake2b(parent + tokens.tobytes(), digest_size=KEY_BYTES).digest()


def block_keys(tokens: "array[int]") -> list[bytes]:
    """Return the keys of all whole blocks of a prompt, each depending on all before it."""
    keys, parent = [], ROOT
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        parent = chained(parent, tokens[end - BLOCK_TOKENS : end])
        keys.append(parent)
    return keys


def head_of(
    fingerprint: bytes, parent: bytes, number: int, tokens: "array[int]", state: NDArray[np.uint8]
) -> BlockHead:
    """Return the head of a block with this state; reads all of it once for its checksum."""
    return BlockHead(fingerprint, parent, number, tokens, state.nbytes, zlib.crc32(state.data))


def file_bytes(head: BlockHead) -> int:
    """Return how large the block's file is."""
    return _HEAD_BYTES + head.state_bytes


def write_block(path: Path, head: BlockHead, state: NDArray[np.uint8]) -> None:
    """Write a block so that `path` is whole or not there, whenever the process is killed.

    After a loss of power it may be short or empty, which its length and checksums show; so it is
    not forced to the disk.  Raises OSError.
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
    """Return where this process writes `path` before it gets its name."""
    return path.with_suffix(f".{os.getpid()}.tmp")


def writer_of(scratch: Path) -> int | None:
    """Return the process that writes a scratch file; None for a name that is none of ours."""
    _, _, rest = scratch.name.partition(".")
    number, _, kind = rest.partition(".")
    return int(number) if kind == "tmp" and number.isdecimal() else None


def read_head(path: Path) -> BlockHead:
    """Read a block without its state.  Raises DamagedBlock, OSError."""
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
        raise DamagedBlock(f"{path.name} is of another version")
    if size != _HEAD_BYTES + state_bytes:
        raise DamagedBlock(f"{path.name} has {size} bytes, not {_HEAD_BYTES + state_bytes}")
    tokens = array("i", front[_HEAD.size : -_CHECKSUM.size])
    return BlockHead(fingerprint, parent, number, tokens, state_bytes, state_checksum)


def read_state(path: Path, head: BlockHead) -> NDArray[np.uint8]:
    """Read the state of the block that `head` describes.  Raises DamagedBlock, OSError."""
    with path.open("rb") as file:
        file.seek(_HEAD_BYTES)
        state = np.fromfile(file, np.uint8)
    if state.nbytes != head.state_bytes or zlib.crc32(state.data) != head.state_checksum:
        raise DamagedBlock(f"the state in {path.name} is damaged")
    return state
