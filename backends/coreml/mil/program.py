"""Parses the operations of an ML program from its model file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.coreml.mil.wire import Message, WireError
from backends.coreml.spec import ML_PROGRAM, CoremlSpec, broken, top_level
from core.units import MIB

_MAX_PROGRAM_BYTES = 256 * MIB
_MAX_OPERATIONS = 1_000_000
_MAX_RANK = 16
_STRING = 2

# Source: the format's MIL.proto, enum DataType, with its names for sub-byte types.
DATA_TYPES = {
    1: "bool",
    2: "string",
    10: "float16",
    11: "float32",
    12: "float64",
    13: "bfloat16",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
# Fields of TensorValue: numpy type of the packed numbers, None for varints.
_INLINE = {1: "<f4", 2: None, 3: None, 5: None, 6: "<f8"}


@dataclass(frozen=True, slots=True)
class Blob:
    """The location of a constant's data: file path in the package, and offset of the record."""

    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant value; `dtype` is one of DATA_TYPES, strings have no shape."""

    dtype: str
    shape: tuple[int, ...]
    value: "Blob | NDArray[np.generic] | str"

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


Argument: TypeAlias = "str | Constant"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation; arguments are names of earlier values, or constants."""

    type: str
    arguments: Mapping[str, tuple[Argument, ...]]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One function of an ML program."""

    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def constants(self) -> Iterator[Constant]:
        """Yield every constant."""
        for operation in self.operations:
            for values in operation.arguments.values():
                yield from (value for value in values if isinstance(value, Constant))


def read_program(spec: CoremlSpec) -> Program:
    """Read the model's default function; weights are not read.

    Raises BrokenModel for a damaged program, and for models that are not ML programs.
    """
    if spec.kind != ML_PROGRAM:
        raise broken(spec.package, "it is not an ML program; only macOS runs such models")
    try:
        functions = Message(_program_bytes(spec)).entries(2)
        name = spec.default_function if spec.default_function in functions else "main"
        if name not in functions:
            raise WireError("it has no main function")
        function = Message(functions[name])
        blocks = function.entries(3)
        opset = function.text(2)
        if opset not in blocks:
            raise WireError("its function has no block")
        return _block(Message(blocks[opset]))
    except (WireError, OSError, OverflowError, ValueError) as problem:
        raise broken(spec.package, f"its program is damaged ({problem})") from problem


def _program_bytes(spec: CoremlSpec) -> memoryview:
    with spec.model_file.open("rb") as file:
        for number, length, start in top_level(file, spec.model_file.stat().st_size):
            if number == ML_PROGRAM and start is not None:
                if length > _MAX_PROGRAM_BYTES:
                    raise WireError("it is too large")
                file.seek(start)
                return memoryview(file.read(length))
    raise WireError("it is missing")


def _block(block: Message) -> Program:
    operations = block.all_data(3)
    if len(operations) > _MAX_OPERATIONS:
        raise WireError("it has too many operations")
    return Program(
        tuple(_operation(Message(data)) for data in operations),
        tuple(str(name, "utf-8", "replace") for name in block.all_data(2)),
    )


def _operation(message: Message) -> Operation:
    kind = message.text(1)
    if 4 in message:
        # Loops and branches have nested blocks.
        kind += " (with nested blocks)"
    arguments = {
        name: tuple(_binding(binding) for binding in Message(data).messages(1))
        for name, data in message.entries(2).items()
    }
    if kind == "const" or kind.startswith("constexpr_"):
        for name, data in message.entries(5).items():
            if name != "name":
                arguments.setdefault(name, (_constant(Message(data)),))
    return Operation(kind, arguments, tuple(output.text(1) for output in message.messages(3)))


def _binding(binding: Message) -> Argument:
    return _constant(binding.message(2)) if 2 in binding else binding.text(1)


def _constant(value: Message) -> Constant:
    tensor_type = value.message(2).message(1)
    if 1 not in tensor_type:
        return _list(value)
    dtype = DATA_TYPES.get(tensor_type.number(1))
    if dtype is None:
        raise WireError(f"it has constants of the unknown type {tensor_type.number(1)}")
    shape = tuple(each.message(1).number(1) for each in tensor_type.messages(3))
    if len(shape) > _MAX_RANK or not all(0 <= length < 2**40 for length in shape):
        raise WireError("a constant has an invalid shape")
    if 5 in value:
        blob = value.message(5)
        return Constant(dtype, shape, Blob(blob.text(1), blob.number(2)))
    return Constant(dtype, shape, _inline(value.message(3).message(1), dtype, shape))


def _list(value: Message) -> Constant:
    """Return a list or tuple of scalars as an array."""
    content = value.message(3)
    items = content.message(3).messages(1) or content.message(2).messages(1)
    arrays = [item.value for item in map(_constant, items)]
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return Constant("string", (), "")
    numbers = np.asarray(arrays).reshape(-1)
    return Constant("int32", numbers.shape, numbers)


def _inline(tensor: Message, dtype: str, shape: tuple[int, ...]) -> "NDArray[np.generic] | str":
    if dtype == "string":
        return tensor.message(4).text(1)
    count = int(np.prod(shape, dtype=object))
    if 7 in tensor:
        return decode(bytes(tensor.message(7).data(1) or b""), dtype, shape)
    array = _numbers(tensor, dtype)
    if array.size != count:
        raise WireError(f"a constant has {array.size} elements, but its shape has {count}")
    return array.reshape(shape)


def decode(data: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> "NDArray[np.generic]":
    """Decode packed little-endian data to an array; sub-byte types widen to (u)int8.

    bfloat16 widens to float32.  Raises WireError if the length does not match the shape.
    """
    count = int(np.prod(shape, dtype=object))
    bits = data_bits(dtype)
    if len(data) != -(-count * bits // 8):
        raise WireError(f"{len(data):,} bytes are not {count:,} elements of {dtype}")
    if bits < 8:
        return _unpack(np.frombuffer(data, np.uint8), bits, count, dtype == "int4").reshape(shape)
    if dtype == "bfloat16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def data_bits(dtype: str) -> int:
    """Return the bits per element."""
    if dtype == "bool":
        return 8
    if dtype == "string":
        raise WireError("a string where numbers are expected")
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))


def _unpack(
    data: NDArray[np.uint8], bits: int, count: int, is_signed: bool
) -> "NDArray[np.generic]":
    """Unpack elements of `bits` bits each, the first in the lowest bits."""
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        values = ((data[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    else:
        flags = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
        values = flags @ (1 << np.arange(bits, dtype=np.uint8))
    if is_signed:
        return ((values ^ (1 << bits - 1)).astype(np.int8)) - np.int8(1 << bits - 1)
    return values.astype(np.uint8)


def _numbers(tensor: Message, dtype: str) -> "NDArray[np.generic]":
    for field, packed in _INLINE.items():
        if field not in tensor:
            continue
        values = tensor.message(field)
        if packed is None:
            wide = np.asarray(values.numbers(1), np.int64)
            return wide.astype("bool" if dtype == "bool" else dtype)
        data = b"".join(bytes(view) for view in values.all_data(1))
        return np.frombuffer(data, packed).astype(dtype)
    return np.zeros(0, "bool" if dtype == "bool" else dtype)
