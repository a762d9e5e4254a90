"""Reads the constants of an ML program from weight files and decompresses them."""

import struct
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.coreml.mil.program import Blob, Constant, data_bits, decode
from backends.coreml.mil.wire import WireError
from backends.coreml.spec import CoremlSpec, broken, inside

Array: TypeAlias = NDArray[Any]
Values: TypeAlias = Mapping[str, Any]

_MODEL_PATH = "@model_path/"
# Source: the format's blob storage: a record has a marker, its data type, the number of bytes
# and their offset, then the bits of padding.
_RECORD = struct.Struct("<IIQQQ")
_RECORD_MARK = 0xDEADBEEF
_RECORD_TYPES = {
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    5: "bfloat16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}


class WeightReader:
    """Reads the constants of one model; files are opened for each read, not memory-mapped."""

    def __init__(self, spec: CoremlSpec) -> None:
        self._spec = spec

    def array(self, constant: Constant) -> "Array | str":
        """Return a constant's value.  Raises BrokenModel."""
        if not isinstance(constant.value, Blob):
            return constant.value
        try:
            return self._read(constant, constant.value)
        except (WireError, OSError, struct.error, ValueError) as problem:
            raise broken(self._spec.package, f"its weights are damaged ({problem})") from problem

    def _read(self, constant: Constant, blob: Blob) -> Array:
        if not blob.file.startswith(_MODEL_PATH):
            raise WireError(f"they are in {blob.file[:100]!r}, outside of the package")
        name = str(PurePosixPath(blob.file.removeprefix(_MODEL_PATH)))
        path = inside(self._spec.root, name)
        if not path.is_file():
            raise WireError(f"{path.name} is missing")
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(min(blob.offset, size))
            mark, kind, length, start, _ = _RECORD.unpack(file.read(_RECORD.size))
            if mark != _RECORD_MARK or _RECORD_TYPES.get(kind) != constant.dtype:
                raise WireError(
                    "there is no record of its type at the offset that the program gives"
                )
            wanted = -(-constant.elements * data_bits(constant.dtype) // 8)
            if start > size or length > size - start or length != wanted:
                raise WireError("a record is cut off or has another size than its shape")
            file.seek(start)
            data = bytearray(length)
            if file.readinto(data) != length:
                raise WireError("a record is cut off")
        return decode(data, constant.dtype, constant.shape)


def decompress(kind: str, values: Values) -> Array:
    """Compute the value of a `constexpr_` operation.

    Source: the operations' definitions in coremltools, iOS16 and iOS18.  Raises WireError for
    unsupported operations and for arguments that do not fit together.
    """
    handler = _HANDLERS.get(kind)
    if handler is None:
        raise WireError(f"it uses {kind}, which is not supported")
    try:
        return handler(values)
    except (KeyError, ValueError, IndexError, TypeError) as problem:
        raise WireError(f"a {kind} does not fit its data") from problem


def _shift_scale(values: Values) -> Array:
    data, scale, offset = values["data"], values["scale"], values.get("offset")
    dense: Array = data.astype(scale.dtype)
    if offset is not None:
        dense -= _repeat_blocks(offset, data.shape).astype(scale.dtype)
    dense *= _repeat_blocks(scale, data.shape)
    return dense


def _repeat_blocks(array: Array, shape: tuple[int, ...]) -> Array:
    """Repeat the elements of `array` in blocks to `shape`."""
    for axis, length in enumerate(shape):
        blocks, rest = divmod(length, array.shape[axis])
        if rest:
            raise ValueError("blocks of unequal length")
        if blocks > 1:
            array = np.repeat(array, blocks, axis)
    return array


def _lut(values: Values) -> Array:
    indices, lut = values["indices"], values["lut"]
    if "shape" in values:
        shape = tuple(int(length) for length in values["shape"])
        bits = (len(lut) - 1).bit_length()
        return np.asarray(lut[decode(indices.tobytes(), f"uint{bits}", shape)])
    palettes, width = lut.shape[-2:]
    axis = int(values["vector_axis"]) % indices.ndim if width > 1 else indices.ndim - 1
    groups = [indices.shape[i] // lut.shape[i] for i in range(indices.ndim)]
    flat = lut.reshape(-1, palettes, width)
    table = np.arange(len(flat)).reshape(lut.shape[:-2])
    for position, count in enumerate(groups):
        table = np.repeat(table, count, position)
    dense = flat[table, indices]
    dense = np.moveaxis(dense, -1, axis + 1)
    shape = tuple(n * width if i == axis else n for i, n in enumerate(indices.shape))
    return np.asarray(dense.reshape(shape))


def _affine(values: Values) -> Array:
    data, axis = values["quantized_data"], int(values["axis"])

    def along(array: Array) -> Array:
        if array.ndim == 0:
            return array
        shape = [1] * data.ndim
        shape[axis] = -1
        return array.reshape(shape)

    scale = along(values["scale"])
    dense: Array = data.astype(scale.dtype)
    dense = dense - along(values["zero_point"]).astype(scale.dtype)
    dense *= scale
    return dense


def _sparse(values: Values) -> Array:
    data, mask = values["nonzero_data"], values["mask"]
    if "shape" in values:
        mask = decode(mask.tobytes(), "uint1", tuple(int(length) for length in values["shape"]))
    dense = np.zeros(mask.shape, data.dtype)
    dense[mask.astype(bool)] = data.reshape(-1)
    return dense


def _cast(values: Values) -> Array:
    kind = {"fp16": np.float16, "fp32": np.float32}[values["output_dtype"]]
    return np.asarray(values["source_val"], kind)


_HANDLERS = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lut,
    "constexpr_affine_dequantize": _affine,
    "constexpr_sparse_to_dense": _sparse,
    "constexpr_cast": _cast,
}
