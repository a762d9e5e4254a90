"""Reads protobuf messages from a file with size limits, without native code or schema."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import BrokenModel, NotThisFormat

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5

_WINDOW_BYTES = 256 * 1024
# A graph of 100 layers in plain operators has some 300,000 fields.
_MAX_FIELDS = 4_000_000
_MAX_STRING_BYTES = 64 * 1024
_MAX_TOTAL_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `value` is a number, or for `BYTES` the length of the data at `start`."""

    number: int
    wire_type: int
    value: int
    start: int

    @property
    def end(self) -> int:
        """The file offset of the end of a `BYTES` field."""
        return self.start + self.value


class ProtoReader:
    """Reads the messages of one file; skipped fields are not read from disk."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.size_bytes = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._window = b""
        self._window_start = 0
        self._fields = 0
        self._text_bytes = 0

    def broken(self, reason: str) -> BrokenModel:
        """Return the error for this file."""
        return BrokenModel(f"The ONNX file {self.path.name} is damaged: {reason}.", param="model")

    def beginning(self, count: int) -> bytes:
        """Return the first `count` bytes, fewer if the file is shorter."""
        return os.pread(self._descriptor, count, 0)

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Yield the fields of the message between two file offsets.  Raises BrokenModel."""
        position = start
        while position < end:
            self._fields += 1
            if self._fields > _MAX_FIELDS:
                raise self.broken(f"its graph has more than {_MAX_FIELDS:,} fields")
            tag, position = self._varint(position, end)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == VARINT:
                value, position = self._varint(position, end)
                yield Field(number, wire_type, value, position)
                continue
            if wire_type == BYTES:
                value, position = self._varint(position, end)
            elif wire_type in (FIXED64, FIXED32):
                value = 8 if wire_type == FIXED64 else 4
            else:
                raise self.broken(f"a field has the unknown wire type {wire_type}")
            if value > end - position:
                raise self.broken(f"it is cut off, or a length of {value:,} bytes in it is wrong")
            yield Field(number, wire_type, value, position)
            position += value

    def text(self, field: Field) -> str:
        """Return a string field; invalid UTF-8 is replaced.  Raises BrokenModel over 64 KiB."""
        return self.data(field).decode("utf-8", "replace")

    def data(self, field: Field) -> bytes:
        """Return a field's bytes.  Raises BrokenModel over 64 KiB."""
        if field.wire_type != BYTES or field.value > _MAX_STRING_BYTES:
            raise self.broken(
                f"a string in it has {field.value:,} bytes (limit {_MAX_STRING_BYTES:,}) "
                "or another type"
            )
        self._text_bytes += field.value
        if self._text_bytes > _MAX_TOTAL_BYTES:
            raise self.broken(f"its strings have more than {_MAX_TOTAL_BYTES:,} bytes in all")
        offset = self._fill(field.start, field.value)
        return self._window[offset : offset + field.value]

    def numbers(self, field: Field) -> list[int]:
        """Return a repeated signed integer, packed or not."""
        if field.wire_type == VARINT:
            return [signed(field.value)]
        if field.wire_type != BYTES or field.value > _MAX_STRING_BYTES:
            raise self.broken(
                f"a list of numbers in it has {field.value:,} bytes (limit {_MAX_STRING_BYTES:,}) "
                "or another type"
            )
        found, position = [], field.start
        while position < field.end:
            value, position = self._varint(position, field.end)
            found.append(signed(value))
        return found

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        length = min(10, end - position)
        if length <= 0:
            raise self.broken("it is cut off inside a number")
        offset = self._fill(position, length)
        window = self._window
        byte = window[offset]
        if byte < 0x80:
            return byte, position + 1
        value, shift = byte & 0x7F, 7
        for index in range(1, length):
            byte = window[offset + index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position + index + 1
            shift += 7
        raise self.broken("a number in it has no end")

    def _fill(self, position: int, count: int) -> int:
        """Load `count` bytes from `position` into the window; return their offset in it."""
        offset = position - self._window_start
        if offset >= 0 and offset + count <= len(self._window):
            return offset
        self._window = os.pread(self._descriptor, max(count, _WINDOW_BYTES), position)
        self._window_start = position
        if len(self._window) < count:
            raise self.broken("it became shorter while it was read")
        return 0


def signed(value: int) -> int:
    """Convert an unsigned 64-bit number to int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


@contextmanager
def open_proto(path: Path) -> Iterator[ProtoReader]:
    """Open a file for reading.  Raises NotThisFormat unless it is a readable regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise NotThisFormat(f"{path.name} cannot be read: {problem.strerror}") from problem
    try:
        if not os.path.isfile(path):
            raise NotThisFormat(f"{path.name} is not a regular file")
        yield ProtoReader(path, descriptor)
    finally:
        os.close(descriptor)
