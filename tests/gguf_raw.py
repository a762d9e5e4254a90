"""A GGUF writer for tests that writes what it is told, true or not."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = (
    range(13)
)
_PACKED = {
    UINT8: "<B", INT8: "<b", UINT16: "<H", INT16: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f",
    BOOL: "<B", UINT64: "<Q", INT64: "<q", FLOAT64: "<d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value of a given GGUF type; bytes go into the file as they are."""

    type_id: int
    value: Any


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array; `count` None means the true one, another may lie."""

    type_id: int
    values: Sequence[Any]
    count: int | None = None


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor table entry; `offset` None means after the tensor before."""

    name: str
    dimensions: tuple[int, ...]
    type_id: int = 0
    data: bytes = b""
    offset: int | None = None


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _payload(type_id: int, value: Any) -> bytes:
    if type_id == STRING:
        return _string(value)
    if isinstance(value, bytes):
        return value
    return struct.pack(_PACKED[type_id], value)


def _typed(value: Any) -> Typed | Array:
    match value:
        case Typed() | Array():
            return value
        case bool():
            return Typed(BOOL, value)
        case int():
            return Typed(UINT32 if 0 <= value < 2**32 else INT64, value)
        case float():
            return Typed(FLOAT32, value)
        case str():
            return Typed(STRING, value)
        case [str(), *_]:
            return Array(STRING, value)
        case [float(), *_]:
            return Array(FLOAT32, value)
        case _:
            return Array(INT32, value)


def metadata_entry(key: str, value: Any) -> bytes:
    """Return one metadata entry; a plain Python value gets the type that fits it."""
    entry = _typed(value)
    if isinstance(entry, Typed):
        return (
            _string(key) + struct.pack("<I", entry.type_id) + _payload(entry.type_id, entry.value)
        )
    count = len(entry.values) if entry.count is None else entry.count
    body = b"".join(_payload(entry.type_id, item) for item in entry.values)
    return _string(key) + struct.pack("<IIQ", ARRAY, entry.type_id, count) + body


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any] | Iterable[tuple[str, Any]],
    tensors: Sequence[RawTensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    metadata_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> Path:
    """Write a GGUF file of exactly these parts, true or not; counts None are the true ones.

    Pairs instead of a mapping allow a key twice.  `alignment` only places the data.
    """
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    head = bytearray(magic + struct.pack("<I", version))
    head += struct.pack(
        "<QQ",
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if metadata_count is None else metadata_count,
    )
    for key, value in pairs:
        head += metadata_entry(key, value)
    data = bytearray()
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        head += _string(tensor.name) + struct.pack("<I", len(tensor.dimensions))
        head += b"".join(struct.pack("<Q", size) for size in tensor.dimensions)
        head += struct.pack("<IQ", tensor.type_id, offset)
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    if tensors:
        head += bytes(-len(head) % alignment)
    path.write_bytes(bytes(head + data))
    return path


def minimal_metadata(**more: Any) -> dict[str, Any]:
    """Return the metadata of a plausible llama model; dots in keys are written as `__`."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.context_length": 2048,
        "llama.embedding_length": 8,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata.update({key.replace("__", "."): value for key, value in more.items()})
    return metadata


def minimal_gguf(path: Path, **more: Any) -> Path:
    """Write a valid file with one f32 tensor of 8 × 4; llama.cpp would not run it."""
    weights = np.arange(32, dtype="<f4").tobytes()
    return write_gguf(
        path, minimal_metadata(**more), [RawTensor("token_embd.weight", (8, 4), 0, weights)]
    )
