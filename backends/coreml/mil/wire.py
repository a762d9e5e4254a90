"""Parses protobuf messages in memory without generated code; every length is checked."""

from collections.abc import Iterator
from typing import TypeAlias

FieldValue: TypeAlias = "int | memoryview"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_SIGN = 1 << 63


class WireError(ValueError):
    """The bytes are not a valid protobuf message, or not the expected one."""


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return an unsigned varint and the position after it.  Raises WireError."""
    value = shift = 0
    for byte in data[position : position + _MAX_VARINT_BYTES]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
        shift += 7
    raise WireError("a number is cut off or too long")


def read_fields(data: memoryview) -> Iterator[tuple[int, FieldValue]]:
    """Yield (field number, value) of one message; numbers are unsigned, other values views.

    Source: the protobuf encoding specification; groups are refused.
    """
    position, end = 0, len(data)
    while position < end:
        tag, position = read_varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = read_varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, position = read_varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise WireError(f"unknown wire type {kind}")
        if length > end - position:
            raise WireError("a field is longer than its message")
        yield tag >> 3, data[position : position + length]
        position += length


class Message:
    """The fields of one message by number, in file order."""

    __slots__ = ("_fields",)

    def __init__(self, data: memoryview) -> None:
        """Parse one level; nested messages stay bytes.  Raises WireError."""
        self._fields: dict[int, list[FieldValue]] = {}
        for number, value in read_fields(data):
            self._fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def number(self, field: int, default: int = 0) -> int:
        """Return a varint field as a signed 64-bit number."""
        value = self._fields.get(field, [default])[-1]
        if not isinstance(value, int):
            raise WireError(f"field {field} is not a number")
        return value - 2 * _SIGN if value >= _SIGN else value

    def data(self, field: int) -> memoryview | None:
        """Return a field's bytes, None if it is missing."""
        value = self._fields.get(field, [None])[-1]
        if isinstance(value, int):
            raise WireError(f"field {field} is not a message")
        return value

    def all_data(self, field: int) -> list[memoryview]:
        """Return the bytes of every occurrence of a repeated field."""
        return [_as_view(value, field) for value in self._fields.get(field, [])]

    def text(self, field: int) -> str:
        """Return a string field, empty if it is missing."""
        return str(self.data(field) or b"", "utf-8", "replace")

    def message(self, field: int) -> "Message":
        """Return a nested message, an empty one if it is missing."""
        return Message(self.data(field) or memoryview(b""))

    def messages(self, field: int) -> list["Message"]:
        """Return a repeated nested message."""
        return [Message(data) for data in self.all_data(field)]

    def entries(self, field: int) -> dict[str, memoryview]:
        """Return a `map<string, …>` field, its values as bytes."""
        entries = (Message(data) for data in self.all_data(field))
        return {entry.text(1): entry.data(2) or memoryview(b"") for entry in entries}

    def numbers(self, field: int) -> list[int]:
        """Return a repeated number field, packed or not, as signed 64-bit numbers."""
        numbers: list[int] = []
        for value in self._fields.get(field, []):
            if isinstance(value, int):
                numbers.append(value)
                continue
            position = 0
            while position < len(value):
                number, position = read_varint(value, position)
                numbers.append(number)
        return [number - 2 * _SIGN if number >= _SIGN else number for number in numbers]


def _as_view(value: FieldValue, field: int) -> memoryview:
    if isinstance(value, int):
        raise WireError(f"field {field} is not a message")
    return value
