"""Messages between a Core ML process and its parent: a JSON head, then the bytes of arrays."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Length of the JSON, and of the arrays together.
LENGTHS = struct.Struct(">IQ")

Arrays = dict[str, NDArray[Any]]


def packed(
    head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
) -> list[bytes | memoryview]:
    """Return one message in pieces; `head` is JSON-serializable and has no key `arrays`.

    The pieces of arrays are views, because a copy of half a megabyte takes as long as its sending.
    """
    found = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    described = [[name, array.dtype.str, array.shape] for name, array in found.items()]
    text = json.dumps({**head, "arrays": described}).encode("ascii")
    data = [array.reshape(-1).view(np.uint8).data for array in found.values()]
    return [LENGTHS.pack(len(text), sum(map(len, data))) + text, *data]


def unpacked(text: bytes, data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Return a message's head and arrays; the arrays are read-only views of `data`."""
    head: dict[str, Any] = json.loads(text)
    arrays: Arrays = {}
    start = 0
    for name, kind, shape in head.pop("arrays"):
        dtype = np.dtype(kind)
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
    return head, arrays


def selected(output: Any, rows: tuple[int, int] | None) -> NDArray[np.float32]:
    """Return an output as float32, or only a range of its rows of the last axis.

    Some models give one row, that of the last token; then it is returned, whatever `rows` are.
    """
    array = np.asarray(output, np.float32)
    if rows is None:
        return array
    table = array.reshape(-1, array.shape[-1])
    return table if len(table) == 1 else table[slice(*rows)]
