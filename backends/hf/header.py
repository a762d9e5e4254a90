"""Reads JSON, text and safetensors headers of a Hugging Face folder with size limits.

Source: the safetensors format description in its repository's README.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import Any, Protocol

from core.errors import BrokenModel, NotThisFormat
from core.units import MIB, format_bytes

MAX_CONFIG_BYTES = 8 * MIB
MAX_HEADER_BYTES = 32 * MIB
_MAX_RANK = 16
_MAX_SIZE = 2**63 - 1
_LENGTH = struct.Struct("<Q")
_LFS_POINTER = b"version https://git-lfs"

# Bits per element.
DTYPE_BITS: Mapping[str, int] = MappingProxyType({
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8,
    "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `dtype` is the format's name, such as `BF16`.

    `start` is the place of its data in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = field(default=0, compare=False)

    @property
    def elements(self) -> int:
        """Number of stored elements; for packed tensors not the number of parameters."""
        return _product(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of one safetensors file: its tensors and metadata."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


class _Sized(Protocol):
    """A tensor of any weight file; `dtype` is named as in safetensors."""

    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


def count_bytes(tensors: Iterable[_Sized]) -> Counter[str]:
    """Return the total bytes of the tensors of each dtype."""
    count: Counter[str] = Counter()
    for each in tensors:
        count[each.dtype] += each.nbytes
    return count


def broken(path: Path, reason: str) -> BrokenModel:
    """Return the error for a file that is damaged, malicious or unusable."""
    name = os.fsencode(path.name).decode("utf-8", "replace")
    return BrokenModel(f"The file {name!r} cannot be used: {reason}.", param="model")


def read_bytes(path: Path, limit: int, *, start: int = 0, count: int | None = None) -> bytes:
    """Return `count` bytes of a regular file from `start`, or all of it; never blocks on a pipe.

    At the end of the file fewer are returned.  Raises FileNotFoundError, and BrokenModel for
    what is not a regular file, cannot be read, or is larger than `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError) as error:
        raise broken(path, f"reading it failed ({error})") from error
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode):
            raise broken(path, "it is not a regular file")
        wanted = status.st_size - start if count is None else min(count, status.st_size - start)
        if wanted > limit:
            raise broken(
                path, f"its {format_bytes(wanted)} are over the limit of {format_bytes(limit)}"
            )
        return _read(descriptor, start, wanted)
    except OSError as error:
        raise broken(path, f"reading it failed ({error.strerror})") from error
    finally:
        os.close(descriptor)


def _read(descriptor: int, start: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.pread(descriptor, count - len(data), start + len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


def read_text(path: Path, limit: int) -> str:
    """Return a UTF-8 text file.  Raises FileNotFoundError, BrokenModel."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise broken(path, "it is not UTF-8 text") from error


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return a JSON object.  Raises FileNotFoundError, BrokenModel."""
    return _parsed(path, read_text(path, limit))


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no such file.  Raises BrokenModel."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if text.startswith(_LFS_POINTER.decode()):
        raise broken(path, "it is a Git LFS pointer; its content was not downloaded")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise broken(path, "its JSON is nested too deeply") from error
    except ValueError as error:
        raise broken(path, f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise broken(path, "its JSON is not an object")
    return value


def safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of one safetensors file, without its tensors.

    Raises NotThisFormat for files of another format, BrokenModel for damaged ones: every tensor
    must have a known dtype and lie within the file, without overlaps or gaps.
    """
    length, size = _header_length(path)
    data = read_bytes(path, MAX_HEADER_BYTES, start=_LENGTH.size, count=length)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise broken(path, "its header is not UTF-8") from error
    header = _parsed(path, text)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise broken(path, "its __metadata__ is not an object with string values")
    tensors, ranges = {}, []
    for name, value in header.items():
        entry = _entry(path, name, value)
        ranges.append((entry.start, entry.nbytes))
        tensors[name] = replace(entry, start=_LENGTH.size + length + entry.start)
    _check_ranges(path, ranges, size - _LENGTH.size - length)
    return SafetensorsHeader(path, MappingProxyType(tensors), MappingProxyType(metadata))


def _header_length(path: Path) -> tuple[int, int]:
    """Return the header's length and the file's size, both in bytes."""
    try:
        start = read_bytes(path, MIB, count=32)
        size = path.stat().st_size
    except OSError as error:
        raise broken(path, "it does not exist") from error
    if start.startswith(_LFS_POINTER):
        raise broken(path, "it is a Git LFS pointer; its content was not downloaded")
    begins_header = start[_LENGTH.size : _LENGTH.size + 1] == b"{"
    if not begins_header and path.suffix != ".safetensors":
        raise NotThisFormat("it has no safetensors header")
    if len(start) < _LENGTH.size:
        raise broken(path, f"it has only {len(start)} bytes; download it again")
    (length,) = _LENGTH.unpack_from(start)
    if length > MAX_HEADER_BYTES:
        raise broken(
            path,
            f"its header claims {format_bytes(length)}, over the limit of "
            f"{format_bytes(MAX_HEADER_BYTES)}",
        )
    if _LENGTH.size + length > size:
        raise broken(
            path, f"it ends at byte {size}, inside its header of {length} bytes; download it again"
        )
    if not begins_header:
        raise broken(path, "it has no safetensors header")
    return length, size


def _entry(path: Path, name: str, value: object) -> TensorEntry:
    """Return a tensor's entry; its `start` counts from the end of the header."""
    label = f"the tensor {name[:200]!r}"
    if not isinstance(value, dict):
        raise broken(path, f"the entry of {label} is not an object")
    dtype = value.get("dtype")
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if not isinstance(dtype, str) or bits is None:
        raise broken(path, f"{label} has the unknown dtype {str(dtype)[:40]!r}")
    shape, offsets = _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
    if shape is None or len(shape) > _MAX_RANK:
        raise broken(path, f"{label} has an invalid shape")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(path, f"{label} has invalid offsets")
    begin, end = offsets
    if _product(shape) * bits != (end - begin) * 8:
        raise broken(
            path, f"{label} has {end - begin} bytes, which does not match its shape and dtype"
        )
    return TensorEntry(dtype, shape, end - begin, begin)


def _sizes(value: object) -> tuple[int, ...] | None:
    """Return the list of sizes as a tuple, None if it is not a list of valid sizes."""
    if not isinstance(value, list):
        return None
    sizes = tuple(n for n in value if type(n) is int and 0 <= n <= _MAX_SIZE)
    return sizes if len(sizes) == len(value) else None


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _check_ranges(path: Path, ranges: list[tuple[int, int]], data_bytes: int) -> None:
    """Raise BrokenModel if tensors overlap, leave gaps, or do not fill the file exactly."""
    position = 0
    for begin, count in sorted(ranges):
        if begin != position:
            problem = "overlap" if begin < position else "have a gap between them"
            raise broken(path, f"its tensors {problem} at byte {min(begin, position)}")
        position += count
    if position > data_bytes:
        raise broken(
            path,
            f"it ends {position - data_bytes} bytes before its last tensor does; download it again",
        )
    if position < data_bytes:
        raise broken(
            path, f"{data_bytes - position} bytes after its last tensor belong to no tensor"
        )
