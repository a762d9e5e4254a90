"""GGUF format tables (tensor and file types), and a bounded reader of header values.

Source: ggml's `docs/gguf.md`, `ggml_type` in `ggml.h`, `llama_ftype` in `llama.h`.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import TypeAlias

from core.errors import BrokenModel, NotThisFormat
from core.units import MIB, format_bytes

MetadataValue: TypeAlias = bool | int | float | str | tuple[bool | int | float, ...]

MAX_STRING_BYTES = 64 * MIB
MAX_TEMPLATE_BYTES = 1 * MIB
MAX_KEPT_BYTES = 32 * MIB
MAX_VOCABULARY_BYTES = 32 * MIB
MAX_ARRAY_STRINGS = 8 * 1024**2
_LONGEST_KEPT_STRING = 1 * MIB
_LONGEST_KEPT_ARRAY = 1024
_WINDOW_BYTES = 1 * MIB

UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_U32, _U64 = _SCALARS[4], _SCALARS[10]

# Type id: name, elements in a block, bytes of a block.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36),
    10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2),
    26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8), 29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}  # fmt: skip

FILE_TYPES: dict[int, str] = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k",
    11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s",
    17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs", 21: "q2_k_s", 22: "iq3_xs",
    23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s",
    29: "iq2_m", 30: "iq4_xs", 31: "iq1_m", 32: "bf16", 36: "tq1_0", 37: "tq2_0",
    38: "mxfp4", 39: "nvfp4", 40: "q1_0", 41: "q2_0",
}  # fmt: skip


def shown(path: Path) -> str:
    """Return the file's name quoted for a message; bytes that are not UTF-8 are replaced."""
    return repr(os.fsencode(path.name).decode("utf-8", "replace"))


def broken(path: Path, reason: str) -> BrokenModel:
    """Return the error for a file that is damaged, malicious or unusable."""
    return BrokenModel(f"The file {shown(path)} cannot be used: {reason}.", param="model")


class HeaderReader:
    """Reads little-endian values in order, within the file's size and within memory limits."""

    def __init__(self, path: Path, descriptor: int, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.position = 0
        self._descriptor = descriptor
        self._window = b""
        self._window_start = 0
        self._kept_bytes = 0
        self._array_strings = 0

    def broken(self, reason: str) -> BrokenModel:
        """Return the error for this file."""
        return broken(self.path, reason)

    def _truncated(self, needed_end: int) -> BrokenModel:
        missing = needed_end - self.size_bytes
        return self.broken(
            f"it ends inside its header: at least {missing:,} bytes ({format_bytes(missing)}) are "
            "missing; it was truncated, or a length in it is wrong; download it again"
        )

    def _require(self, count: int) -> None:
        if count > self.size_bytes - self.position:
            raise self._truncated(self.position + count)

    def _keep(self, count: int) -> None:
        self._kept_bytes += count
        if self._kept_bytes > MAX_KEPT_BYTES:
            raise self.broken(f"its metadata is larger than {format_bytes(MAX_KEPT_BYTES)}")

    def _fill(self, count: int) -> int:
        """Make the window cover the next `count` bytes; return their offset in it."""
        self._require(count)
        start = self.position - self._window_start
        if start >= 0 and start + count <= len(self._window):
            return start
        wanted = max(count, min(_WINDOW_BYTES, self.size_bytes - self.position))
        self._window = os.pread(self._descriptor, wanted, self.position)
        self._window_start = self.position
        if len(self._window) < count:
            raise self.broken("it was truncated while it was read")
        return 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; the caller bounds `count`."""
        start = self._fill(count)
        self.position += count
        return self._window[start : start + count]

    def _number(self, layout: struct.Struct) -> int:
        start = self._fill(layout.size)
        self.position += layout.size
        return int(layout.unpack_from(self._window, start)[0])

    def uint32(self) -> int:
        """Return the next 4 bytes as an unsigned integer."""
        return self._number(_U32)

    def uint64(self) -> int:
        """Return the next 8 bytes as an unsigned integer."""
        return self._number(_U64)

    def _length(self) -> int:
        length = self.uint64()
        if length > MAX_STRING_BYTES:
            raise self.broken(
                f"a string of {length:,} bytes exceeds {format_bytes(MAX_STRING_BYTES)}"
            )
        self._require(length)
        return length

    def name(self, limit: int, what: str) -> str:
        """Return a metadata key or tensor name of at most `limit` bytes."""
        length = self.uint64()
        if not 0 < length <= limit:
            raise self.broken(f"{what} has {length:,} bytes; 1 to {limit:,} are allowed")
        self._keep(length)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8") from None

    def text(self) -> str | None:
        """Return a string with invalid UTF-8 replaced; skip one over 1 MiB and return None."""
        length = self._length()
        if length > _LONGEST_KEPT_STRING:
            self.position += length
            return None
        self._keep(length)
        return self.take(length).decode("utf-8", "replace")

    def template(self) -> str | None:
        """Return a chat template."""
        start = self.position
        text = self.text()
        if text is None:
            size = self.position - start - _U64.size
            raise self.broken(
                f"its chat template of {format_bytes(size)} exceeds the limit of "
                f"{format_bytes(MAX_TEMPLATE_BYTES)}"
            )
        return text

    def scalar(self, type_id: int) -> bool | int | float:
        """Return a value of a fixed-size type."""
        layout = _SCALARS.get(type_id)
        if layout is None:
            raise self.broken(f"a metadata value has the unknown type {type_id}")
        value: bool | int | float = layout.unpack(self.take(layout.size))[0]
        return value

    def numbers(self, type_id: int, count: int) -> tuple[bool | int | float, ...] | None:
        """Return an array's values; skip one of more than 1,024 and return None."""
        layout = _SCALARS.get(type_id)
        if layout is None:
            kind = "nested arrays are" if type_id == ARRAY else f"element type {type_id} is"
            raise self.broken(f"a metadata array is unreadable: {kind} not supported")
        self._require(count * layout.size)
        if count > _LONGEST_KEPT_ARRAY:
            self.position += count * layout.size
            return None
        self._keep(count * layout.size)
        data = self.take(count * layout.size)
        return tuple(value for (value,) in layout.iter_unpack(data))

    def skip_strings(self, count: int) -> None:
        """Skip an array of strings."""
        self._require(count * _U64.size)
        self._array_strings += count
        if self._array_strings > MAX_ARRAY_STRINGS:
            raise self.broken(f"its arrays hold more than {MAX_ARRAY_STRINGS:,} strings")
        window, start = self._window, self._window_start
        offset = self.position - start
        last = len(window) - _U64.size
        unpack = _U64.unpack_from
        for _ in range(count):
            # Vocabularies have 150,000 strings and more: only one call for each.
            if not 0 <= offset <= last:
                self.position = start + offset
                offset = self._fill(_U64.size)
                window, start = self._window, self._window_start
                last = len(window) - _U64.size
            (length,) = unpack(window, offset)
            if length > MAX_STRING_BYTES:
                raise self.broken(f"a string of {length:,} bytes exceeds 64 MiB")
            offset += _U64.size + length
        self.position = start + offset
        self._require(0)

    def strings_between(self, start: int, end: int) -> list[bytes]:
        """Return the strings of an array that `skip_strings` skipped from `start` to `end`."""
        if end - start > MAX_VOCABULARY_BYTES:
            raise self.broken(f"its vocabulary exceeds {format_bytes(MAX_VOCABULARY_BYTES)}")
        data = os.pread(self._descriptor, end - start, start)
        texts = []
        offset = 0
        while offset < end - start:
            if len(data) - offset < _U64.size:
                raise self.broken("it was truncated while it was read")
            (length,) = _U64.unpack_from(data, offset)
            offset += _U64.size
            texts.append(data[offset : offset + length])
            offset += length
        return texts


@contextmanager
def opened(path: Path) -> Iterator[HeaderReader]:
    """Open a regular file for reading; never blocks on a pipe.

    Raises NotThisFormat for anything but a regular file, BrokenModel when reading fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise broken(path, f"reading it failed ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode):
            raise NotThisFormat("not a regular file")
        yield HeaderReader(path, descriptor, status.st_size)
    except OSError as error:
        raise broken(path, f"reading it failed ({error.strerror})") from error
    finally:
        os.close(descriptor)
