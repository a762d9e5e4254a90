"""Reads the pickle of a PyTorch state dict safely, without importing or calling anything.

A pickle is a program.  This module interprets the few instructions that `torch.save` writes for
tensors, over plain values, and refuses all others.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_PICKLE_BYTES = 32 << 20
_MAX_OPERATIONS = 4_000_000
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**48
_ELEMENT_BYTES = {
    "FloatStorage": ("f32", 4),
    "HalfStorage": ("f16", 2),
    "BFloat16Storage": ("bf16", 2),
    "DoubleStorage": ("f64", 8),
    "LongStorage": ("i64", 8),
    "IntStorage": ("i32", 4),
    "ShortStorage": ("i16", 2),
    "CharStorage": ("i8", 1),
    "ByteStorage": ("u8", 1),
    "BoolStorage": ("bool", 1),
}
# Types without a storage class of their own: their storages are of bytes.
_LATER_TYPES = {
    "float8_e4m3fn": ("f8_e4m3", 1),
    "float8_e5m2": ("f8_e5m2", 1),
    "float8_e4m3fnuz": ("f8_e4m3fnuz", 1),
    "float8_e5m2fnuz": ("f8_e5m2fnuz", 1),
    "float8_e8m0fnu": ("f8_e8m0", 1),
    "uint16": ("u16", 2),
    "uint32": ("u32", 4),
    "uint64": ("u64", 8),
}
_BYTES = "bytes"
_UNTYPED = "torch.storage.UntypedStorage"
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_LATER_TENSOR = "torch._utils._rebuild_tensor_v3"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_SIZE = "torch.Size"
ALLOWED = frozenset({
    _ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_LATER_TENSOR, _REBUILD_PARAMETER, _SIZE, _UNTYPED,
    *(f"torch.{name}" for name in (*_ELEMENT_BYTES, *_LATER_TYPES)),
})  # fmt: skip


class UnsafePickle(ValueError):
    """The pickle is damaged, or uses something that tensors do not need; see the message."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that tensors view: `elements` of `element_bytes` each."""

    key: str
    dtype: str
    elements: int
    element_bytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor's type and shape, and the storage that it views."""

    dtype: str
    shape: tuple[int, ...]
    storage: Storage

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, however large its storage is."""
        return self.elements * self.storage.element_bytes


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


_MARK = object()


@dataclass(slots=True)
class _PickleMachine:
    """A pickle machine with stack and memo, over plain values only."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self) -> Any:
        if not self.stack:
            raise UnsafePickle("its pickle pops from an empty stack")
        value = self.stack.pop()
        if value is _MARK:
            raise UnsafePickle("its pickle's marks are out of order")
        return value

    def pop_to_mark(self) -> list[Any]:
        values = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise UnsafePickle("its pickle's marks are out of order")
        self.stack.pop()
        return values[::-1]

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(values[::-1]))

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise UnsafePickle("its pickle sets an item of a value that is not a dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise UnsafePickle("a dictionary key in it is neither a string nor a number")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise UnsafePickle("its pickle appends to a value that is not a list")
        target.extend(values)

    def build(self) -> None:
        """Ignore an object's attributes, such as the `_metadata` of a state dict."""
        self.pop()
        if not isinstance(self.top(), dict):
            raise UnsafePickle("its pickle sets the state of an object that is not a dictionary")

    def push_global(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise UnsafePickle(
                f"its pickle imports {full[:200]!r}, which tensors do not need and which could run "
                "code; save the model's state dict instead"
            )
        self.stack.append(_Global(full))

    def push_stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def push_memo(self, index: int) -> None:
        if index not in self.memo:
            raise UnsafePickle("its pickle reads a memo entry that it never stored")
        self.stack.append(self.memo[index])

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafePickle("its pickle calls a value that is not a function")
        self.stack.append(_call(function.name, arguments))


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """Emulate a call of an allowed function over plain values."""
    if name == _REBUILD_TENSOR:
        return _tensor(arguments)
    if name == _REBUILD_LATER_TENSOR:
        return _later_tensor(arguments)
    if name == _REBUILD_PARAMETER and arguments and isinstance(arguments[0], PickledTensor):
        return arguments[0]
    if name == _ORDERED_DICT and arguments in ((), ([],)):
        return {}
    if name == _SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple):
        return arguments[0]
    raise UnsafePickle(f"its pickle calls {name} with the wrong arguments")


def _tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """Return the tensor that (storage, offset, size, stride, …) describes.  Raises UnsafePickle."""
    if len(arguments) not in (5, 6, 7) or not isinstance(arguments[0], Storage):
        raise UnsafePickle("a tensor in it has no storage")
    if arguments[0].dtype == _BYTES:
        raise UnsafePickle("a tensor in it has a storage without a type")
    storage, offset, shape, stride = arguments[:4]
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)):
        raise UnsafePickle("a tensor in it has no shape")
    numbers = (offset, *shape, *stride)
    is_sane = (
        len(shape) == len(stride) <= _MAX_DIMENSIONS
        and all(type(number) is int and 0 <= number <= _MAX_ELEMENTS for number in numbers)
        and math.prod(shape) <= storage.elements
    )
    if not is_sane:
        raise UnsafePickle("a tensor in it has an invalid shape")
    steps = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and offset + steps >= storage.elements:
        raise UnsafePickle("a tensor in it reaches beyond its storage")
    return PickledTensor(storage.dtype, shape, storage)


def _later_tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """Return the tensor that (storage of bytes, …, type, …) describes.  Raises UnsafePickle."""
    storage, kind = arguments[0] if arguments else None, arguments[6] if arguments[6:] else None
    found = (
        _LATER_TYPES.get(kind.name.removeprefix("torch.")) if isinstance(kind, _Global) else None
    )
    if len(arguments) > 8 or found is None or not isinstance(storage, Storage):
        raise UnsafePickle("a tensor in it has no known type or no storage")
    dtype, size = found
    typed = Storage(storage.key, dtype, storage.elements // size, size)
    return _tensor((typed, *arguments[1:6]))


def _storage(identity: Any) -> Storage:
    """Return the storage of a persistent id: ("storage", type, key, device, elements, …)."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise UnsafePickle("its pickle has a persistent id that is not a storage")
    _, kind, key, _, elements = identity[:5]
    is_sane = (
        isinstance(kind, _Global)
        and isinstance(key, str)
        and type(elements) is int
        and 0 <= elements <= _MAX_ELEMENTS
        and identity[5:] in ((), (None,))
    )
    found = _ELEMENT_BYTES.get(kind.name.removeprefix("torch.")) if is_sane else None
    if is_sane and kind.name == _UNTYPED:
        found = (_BYTES, 1)
    if found is None:
        raise UnsafePickle("a storage in it has no known type or size")
    return Storage(key, found[0], elements, found[1])


_Step = Callable[[_PickleMachine, Any], None]


def _constant(make: Callable[[], Any]) -> _Step:
    return lambda machine, _: machine.stack.append(make())


def _push(machine: _PickleMachine, argument: Any) -> None:
    machine.stack.append(argument)


def _ignore(_machine: _PickleMachine, _argument: Any) -> None:
    """Ignore frames and the protocol number."""


def _store(machine: _PickleMachine, argument: Any) -> None:
    machine.memo[argument] = machine.top()


def _push_named(machine: _PickleMachine, argument: str) -> None:
    machine.push_global(*argument.split(" ", 1))


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
_STEPS: Mapping[str, _Step] = {
    **dict.fromkeys((*_NUMBERS, *_TEXTS), _push),
    **dict.fromkeys(("PROTO", "FRAME"), _ignore),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _store),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push_memo(index)),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "MARK": _constant(lambda: _MARK),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "MEMOIZE": lambda machine, _: _store(machine, len(machine.memo)),
    "GLOBAL": _push_named,
    "STACK_GLOBAL": lambda machine, _: machine.push_stack_global(),
    "BINPERSID": lambda machine, _: machine.stack.append(_storage(machine.pop())),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}


def read_pickle(data: bytes, start: int = 0) -> tuple[Any, int]:
    """Return the value of the pickle at `start` and its end offset.

    Values are None, booleans, numbers, strings, tuples, lists, dicts and `PickledTensor`.
    Raises UnsafePickle, with the name that the pickle wants to import.
    """
    machine = _PickleMachine()
    try:
        operations = pickletools.genops(data[start:])
        for count, (operation, argument, position) in enumerate(operations):
            if operation.name == "STOP":
                return machine.pop(), start + (position or 0) + 1
            step = _STEPS.get(operation.name)
            if step is None or count > _MAX_OPERATIONS:
                raise UnsafePickle(
                    f"its pickle has the instruction {operation.name}, which tensors do not need"
                    if step is None
                    else "its pickle is longer than any state dict"
                )
            step(machine, argument)
    except UnsafePickle:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as problem:
        raise UnsafePickle(f"its pickle is damaged ({problem})") from problem
    raise UnsafePickle("its pickle does not end")
