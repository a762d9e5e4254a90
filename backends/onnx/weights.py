"""Reads the sizes of an ONNX graph's weights and checks their external files.

Source of the field numbers: onnx/onnx.proto3 (TensorProto, StringStringEntryProto).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from backends.onnx.proto import BYTES, Field, ProtoReader

# TensorProto.DataType: name, bits per element.
DATA_TYPES: Mapping[int, tuple[str, int]] = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16),
    6: ("int32", 32), 7: ("int64", 64), 8: ("string", 0), 9: ("bool", 8), 10: ("float16", 16),
    11: ("float64", 64), 12: ("uint32", 32), 13: ("uint64", 64), 14: ("complex64", 64),
    15: ("complex128", 128), 16: ("bfloat16", 16), 17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8), 19: ("float8e5m2", 8), 20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4), 22: ("int4", 4), 23: ("float4e2m1", 4), 24: ("float8e8m0", 8),
    25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip
_FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
_TYPED_DATA = frozenset({4, 5, 6, 7, 10, 11})
MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 50


@dataclass(slots=True)
class _Tensor:
    name: str = ""
    data_type: int = 0
    shape: list[int] = field(default_factory=list)
    stored_bytes: int = 0
    raw_bytes: int = -1
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


@dataclass(slots=True)
class Weights:
    """A summary of all weights: `totals` are bytes by dtype.

    `external` is the end of what is read from each external file, in bytes.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    external: dict[str, int] = field(default_factory=dict)


def add_tensor(reader: ProtoReader, message: Field, found: Weights) -> None:
    """Add one tensor message.  Raises BrokenModel."""
    tensor = _read_tensor(reader, message)
    dtype, bits = DATA_TYPES.get(tensor.data_type, ("", 0))
    if not dtype:
        raise reader.broken(f"a weight has the unknown type {tensor.data_type}")
    if len(tensor.shape) > MAX_DIMENSIONS or any(size < 0 for size in tensor.shape):
        raise reader.broken(f"the weight {tensor.name[:100]!r} has an invalid shape")
    elements = math.prod(tensor.shape)
    if elements > _MAX_ELEMENTS:
        raise reader.broken(
            f"the weight {tensor.name[:100]!r} has {elements:,} elements, more than "
            f"{_MAX_ELEMENTS:,}"
        )
    size = (elements * bits + 7) // 8
    if tensor.is_external:
        _add_external(reader, tensor, size, found)
    elif tensor.raw_bytes >= 0 and bits and tensor.raw_bytes != size:
        raise reader.broken(
            f"the weight {tensor.name[:100]!r} has {tensor.raw_bytes:,} bytes, not {size:,}"
        )
    elif tensor.raw_bytes < 0 and bits and elements > tensor.stored_bytes * 2:
        raise reader.broken(f"the weight {tensor.name[:100]!r} has no data")
    if tensor.name:
        found.shapes[tensor.name] = tuple(tensor.shape)
        if elements > 1 and (dtype in _FLOATS or bits <= 8):
            found.elements[tensor.name] = elements
    found.totals[dtype] += size


def _read_tensor(reader: ProtoReader, message: Field) -> _Tensor:
    tensor = _Tensor()
    for item in reader.fields(message.start, message.end):
        if item.number == 1:
            tensor.shape.extend(reader.numbers(item))
        elif item.number == 2:
            tensor.data_type = item.value
        elif item.number == 8:
            tensor.name = reader.text(item)
        elif item.number == 9:
            tensor.raw_bytes = item.value
        elif item.number == 13 and item.wire_type == BYTES:
            pair = {part.number: reader.text(part) for part in reader.fields(item.start, item.end)}
            tensor.external[pair.get(1, "")] = pair.get(2, "")
        elif item.number == 14:
            tensor.is_external = item.value == 1
        elif item.number in _TYPED_DATA:
            tensor.stored_bytes += item.value if item.wire_type == BYTES else 1
    # A location without the flag must not bypass the check below.
    tensor.is_external = tensor.is_external or bool(tensor.external)
    return tensor


def _add_external(reader: ProtoReader, tensor: _Tensor, size: int, found: Weights) -> None:
    location = tensor.external.get("location", "")
    pure = PurePosixPath(location)
    if not location or pure.is_absolute() or ".." in pure.parts or "\\" in location:
        raise reader.broken(f"its weights are outside of its folder, at {location[:100]!r}")
    offset, length = tensor.external.get("offset", "0"), tensor.external.get("length", str(size))
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in (offset, length)):
        raise reader.broken(f"the offset of the weight {tensor.name[:100]!r} is not a number")
    if int(length) != size:
        raise reader.broken(
            f"the weight {tensor.name[:100]!r} has {int(length):,} bytes, not {size:,}"
        )
    end = int(offset) + size
    found.external[location] = max(end, found.external.get(location, 0))


def check_external(reader: ProtoReader, location: str, end: int) -> None:
    """Raise BrokenModel unless an external file is complete and in the graph's folder."""
    folder, target = reader.path.parent, reader.path.parent / location
    if not target.is_file():
        raise reader.broken(f"its weights are missing ({location[:100]}); download them too")
    # Download caches link both the model and its weights to targets in one folder.
    homes = (folder.resolve(), reader.path.resolve().parent)
    if not any(target.resolve().is_relative_to(home) for home in homes):
        linked = " through a link; download the model into a plain folder, without links"
        raise reader.broken(
            f"its weights are outside of its folder, at {location[:100]!r}"
            f"{linked if target.is_symlink() else ''}"
        )
    missing = end - target.stat().st_size
    if missing > 0:
        raise reader.broken(
            f"{missing:,} bytes of its weights are missing in {location[:100]}; download it again"
        )
