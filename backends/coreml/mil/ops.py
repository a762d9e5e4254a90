"""Implements the operations of ML programs (MIL) on PyTorch tensors.

Source: the operations' definitions in coremltools, `converters/mil/mil/ops/defs`.  Arguments
are passed by name; constant parameters are Python numbers and lists.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

Tensor: TypeAlias = Any
Arguments: TypeAlias = Mapping[str, Any]
Compute: TypeAlias = Callable[[Arguments], Any]

_MAX_ELEMENTS = 2**31

_UNARY = {
    name: name
    for name in (
        "abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2",
        "floor", "logical_not", "round", "sigmoid", "sign", "sin", "sinh", "sqrt", "square",
        "tan", "tanh", "relu",
    )
}  # fmt: skip
_BINARY = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "real_div": "true_divide",
    "floor_div": "floor_divide",
    "mod": "remainder",
    "pow": "pow",
    "maximum": "maximum",
    "minimum": "minimum",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "equal": "eq",
    "not_equal": "ne",
    "logical_and": "logical_and",
    "logical_or": "logical_or",
    "logical_xor": "logical_xor",
}
_REDUCTIONS = {
    "reduce_mean": "mean",
    "reduce_sum": "sum",
    "reduce_max": "amax",
    "reduce_min": "amin",
}
# Operations whose result may share memory with the first input.
VIEWS = frozenset({
    "cast", "expand_dims", "identity", "reshape", "slice_by_index", "slice_by_size", "split",
    "squeeze", "transpose",
})  # fmt: skip


def operations() -> dict[str, Compute]:
    """Return all operations by MIL name; imports PyTorch."""
    import torch
    from torch.nn import functional

    table: dict[str, Compute] = {
        name: partial(_unary, getattr(torch, function)) for name, function in _UNARY.items()
    }
    table |= {
        name: partial(_binary, getattr(torch, function)) for name, function in _BINARY.items()
    }
    table |= {
        name: partial(_reduce, getattr(torch, function)) for name, function in _REDUCTIONS.items()
    }
    table["silu"] = partial(_unary, functional.silu)
    table |= {
        name.removeprefix("_op_"): function
        for name, function in globals().items()
        if name.startswith("_op_")
    }
    return table


def ints(value: Any) -> list[int]:
    """Return the numbers of a tensor or list as integers."""
    numbers = value.tolist() if hasattr(value, "tolist") else value
    return [int(number) for number in (numbers if isinstance(numbers, list) else [numbers])]


def index_of(arguments: Arguments, rank: int) -> tuple[Any, ...]:
    """Return the index for a slice's begin, end, stride and masks."""

    def flags(name: str) -> list[int]:
        value = arguments.get(name)
        return [0] * rank if value is None else ints(value)

    begin, end = ints(arguments["begin"]), ints(arguments["end"])
    stride = ints(arguments["stride"]) if arguments.get("stride") is not None else [1] * rank
    whole_begin, whole_end, squeezed = flags("begin_mask"), flags("end_mask"), flags("squeeze_mask")
    return tuple(
        begin[axis]
        if squeezed[axis]
        else slice(
            None if whole_begin[axis] else begin[axis],
            None if whole_end[axis] else end[axis],
            stride[axis],
        )
        for axis in range(rank)
    )


def _checked(shape: Sequence[int]) -> list[int]:
    count = 1
    for length in shape:
        count *= length
    if count > _MAX_ELEMENTS:
        raise ValueError(f"a result of {count:,} elements is over the limit of {_MAX_ELEMENTS:,}")
    return list(shape)


def _unary(function: Callable[[Tensor], Tensor], arguments: Arguments) -> Tensor:
    return function(arguments["x"])


def _binary(function: Callable[[Tensor, Tensor], Tensor], arguments: Arguments) -> Tensor:
    return function(arguments["x"], arguments["y"])


def _reduce(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    x, axes = arguments["x"], arguments.get("axes")
    chosen = list(range(x.ndim)) if axes is None else ints(axes)
    return function(x, dim=chosen, keepdim=bool(arguments.get("keep_dims", False)))


def _op_identity(arguments: Arguments) -> Tensor:
    return arguments["x"]


def _op_rsqrt(arguments: Arguments) -> Tensor:
    return (arguments["x"] + float(arguments.get("epsilon", 1e-12))).rsqrt()


def _op_log(arguments: Arguments) -> Tensor:
    return (arguments["x"] + float(arguments.get("epsilon", 1e-45))).log()


def _op_inverse(arguments: Arguments) -> Tensor:
    return (arguments["x"] + float(arguments.get("epsilon", 1e-4))).reciprocal()


def _op_clip(arguments: Arguments) -> Tensor:
    return arguments["x"].clamp(float(arguments["alpha"]), float(arguments["beta"]))


def _op_gelu(arguments: Arguments) -> Tensor:
    from torch.nn import functional

    x, mode = arguments["x"], arguments.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * (1.702 * x).sigmoid()
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _op_softmax(arguments: Arguments) -> Tensor:
    return arguments["x"].softmax(int(arguments.get("axis", -1)))


def _op_matmul(arguments: Arguments) -> Tensor:
    x, y = arguments["x"], arguments["y"]
    x = x.transpose(-1, -2) if arguments.get("transpose_x") else x
    return x @ (y.transpose(-1, -2) if arguments.get("transpose_y") else y)


def _op_linear(arguments: Arguments) -> Tensor:
    from torch.nn import functional

    return functional.linear(arguments["x"], arguments["weight"], arguments.get("bias"))


def _op_transpose(arguments: Arguments) -> Tensor:
    return arguments["x"].permute(ints(arguments["perm"]))


def _op_reshape(arguments: Arguments) -> Tensor:
    x = arguments["x"]
    shape = [
        x.shape[axis] if length == 0 else length
        for axis, length in enumerate(ints(arguments["shape"]))
    ]
    return x.reshape(shape)


def _op_expand_dims(arguments: Arguments) -> Tensor:
    x, axes = arguments["x"], ints(arguments["axes"])
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _op_squeeze(arguments: Arguments) -> Tensor:
    axes = arguments.get("axes")
    return arguments["x"].squeeze() if axes is None else arguments["x"].squeeze(tuple(ints(axes)))


def _op_concat(arguments: Arguments) -> Tensor:
    import torch

    values = [value.reshape(1) if not value.ndim else value for value in arguments["values"]]
    return torch.cat(values, int(arguments["axis"]))


def _op_stack(arguments: Arguments) -> Tensor:
    import torch

    return torch.stack(list(arguments["values"]), int(arguments["axis"]))


def _op_split(arguments: Arguments) -> tuple[Tensor, ...]:
    x, axis, sizes = arguments["x"], int(arguments["axis"]), arguments.get("split_sizes")
    if sizes is None:
        return tuple(x.split(x.shape[axis] // int(arguments["num_splits"]), axis))
    return tuple(x.split(ints(sizes), axis))


def _op_tile(arguments: Arguments) -> Tensor:
    x, reps = arguments["x"], ints(arguments["reps"])
    _checked([x.numel(), *reps])
    return x.repeat(reps)


def _op_shape(arguments: Arguments) -> Tensor:
    import torch

    return torch.tensor(arguments["x"].shape, dtype=torch.int32)


def _op_select(arguments: Arguments) -> Tensor:
    return arguments["a"].where(arguments["cond"].bool(), arguments["b"])


def _op_fill(arguments: Arguments) -> Tensor:
    import torch

    value = arguments.get("value", 0.0)
    kind = value.dtype if hasattr(value, "dtype") else None
    number = value.item() if hasattr(value, "item") else value
    return torch.full(_checked(ints(arguments["shape"])), number, dtype=kind)


def _op_range_1d(arguments: Arguments) -> Tensor:
    import torch

    start, end, step = (arguments[name] for name in ("start", "end", "step"))
    kind = next((value.dtype for value in (start, end, step) if hasattr(value, "dtype")), None)
    low, high, by = (v.item() if hasattr(v, "item") else v for v in (start, end, step))
    _checked([int(abs(high - low) / abs(by)) + 1])
    return torch.arange(low, high, by, dtype=kind)


def _op_gather(arguments: Arguments) -> Tensor:
    x, indices, axis = arguments["x"], arguments["indices"], int(arguments.get("axis", 0))
    axis %= x.ndim
    rows = indices.reshape(-1).long()
    rows = rows.where(rows >= 0, rows + x.shape[axis])
    return x.index_select(axis, rows).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _op_gather_along_axis(arguments: Arguments) -> Tensor:
    return arguments["x"].gather(int(arguments.get("axis", 0)), arguments["indices"].long())


def _op_layer_norm(arguments: Arguments) -> Tensor:
    from torch.nn import functional

    x = arguments["x"]
    shape = [x.shape[axis] for axis in ints(arguments["axes"])]
    epsilon = float(arguments.get("epsilon", 1e-5))
    return functional.layer_norm(x, shape, arguments.get("gamma"), arguments.get("beta"), epsilon)


def _op_scaled_dot_product_attention(arguments: Arguments) -> Tensor:
    from torch.nn import functional

    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=arguments.get("attn_mask")
    )


def _op_slice_by_index(arguments: Arguments) -> Tensor:
    x = arguments["x"]
    return x[index_of(arguments, x.ndim)]


def _op_slice_by_size(arguments: Arguments) -> Tensor:
    x, begin, size = arguments["x"], ints(arguments["begin"]), ints(arguments["size"])
    return x[tuple(
        slice(start, None if length == -1 else start + length)
        for start, length in zip(begin, size, strict=True)
    )]  # fmt: skip
