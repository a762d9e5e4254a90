"""Converts the KV cache of an ONNX decoder to bytes and back, layer by layer."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.onnx.session import DecoderSession


def cache_layout(session: DecoderSession) -> str:
    """Identify the cache format: what the bytes depend on besides the model's files."""
    import onnxruntime

    tensors = [(tensor.heads, tensor.head_dim) for tensor in session.layout.cache]
    return f"onnxruntime {onnxruntime.__version__}, {session.cache_dtype}, {tensors}"


def pack_arrays(parts: Iterable[NDArray[Any]]) -> NDArray[np.uint8]:
    """Concatenate (heads, tokens, head_dim) arrays as bytes; copies."""
    copies = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
    return np.concatenate(copies)


def unpack_arrays(
    session: DecoderSession, count: int, state: NDArray[np.uint8]
) -> list[NDArray[Any]] | None:
    """Return the arrays of `count` tokens, None if the bytes have another size."""
    shapes = [(tensor.heads, count, tensor.head_dim) for tensor in session.layout.cache]
    item = session.cache_dtype.itemsize
    if state.nbytes != sum(int(np.prod(shape)) * item for shape in shapes):
        return None
    parts, offset = [], 0
    for shape in shapes:
        size = int(np.prod(shape)) * item
        parts.append(state[offset : offset + size].view(session.cache_dtype).reshape(shape))
        offset += size
    return parts
