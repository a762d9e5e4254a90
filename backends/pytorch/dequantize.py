"""Turns quantized weights into the floating-point weights that they stand for, with PyTorch.

Sources of the formulas: the reference implementations of AutoGPTQ, AutoAWQ, bitsandbytes,
compressed-tensors and ModelOpt, and the OCP Microscaling Formats specification.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from backends.hf.config import NESTED, HfFolder
from backends.hf.header import broken
from backends.hf.layout import weight_layout
from backends.hf.packed import PackedWeight
from backends.hf.quantization import MAX_STATE_BYTES, BnbState, read_bnb_state

# Weights that are computed at once, in float32, besides the result.
_CHUNK_ELEMENTS = 1 << 22
# AutoAWQ's order of the eight values in a word.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_DTYPE_NAMES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int8": "I8", "uint8": "U8",
    "int32": "I32", "uint32": "U32", "int64": "I64",
}  # fmt: skip

# Returns the rows from the first to before the second, as float32.
_Rows: TypeAlias = Callable[[int, int], Any]


class _Stored:
    """A tensor as `backends.hf.packed` describes it."""

    def __init__(self, tensor: Any) -> None:
        name = str(tensor.dtype).removeprefix("torch.")
        self.dtype = _DTYPE_NAMES.get(name, name)
        self.shape = tuple(tensor.shape)


def dequantize(folder: HfFolder, tensors: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the model's weights; quantized ones become `dtype`, others stay as they are.

    Takes the tensors out of `tensors`, so that each packed one is freed as soon as it is not
    needed.  Besides the result, a few temporaries take at most 32 MiB each.
    Raises BrokenModel.
    """
    layout = weight_layout(folder, {name: _Stored(each) for name, each in tensors.items()})
    found = {name: tensors[name] for name in layout.plain}
    for packed in layout.packed:
        parts = {role: tensors.pop(name) for role, name in packed.parts.items()}
        try:
            found[packed.name] = _weight(packed, parts, dtype)
        except (ValueError, IndexError, KeyError, TypeError, RuntimeError) as problem:
            raise broken(
                folder.path / "config.json",
                f"the quantized weight {packed.name[:80]!r} cannot be read ({problem}); download "
                "the weights again",
            ) from problem
    tensors.clear()
    return found


def forget_quantization(config: Any) -> None:
    """Take the quantization out of a configuration, whose weights are dequantized."""
    for level in (config, *(getattr(config, key, None) for key in NESTED)):
        for key in ("quantization_config", "compression_config"):
            if getattr(level, key, None) is not None:
                delattr(level, key)


def _weight(packed: PackedWeight, parts: Mapping[str, Any], dtype: Any) -> Any:
    import torch

    if packed.kind == "mxfp4":
        return _experts(packed, parts, dtype)
    shape, rows = packed.shape, _READERS[packed.kind]
    if packed.kind == "bnb4":
        shape = _bnb_state(parts).shape
    result = torch.empty(shape, dtype=dtype)
    if len(shape) > 2:
        flat = result.reshape(-1, *shape[-2:])
        for index, matrix in enumerate(flat):
            inner = {role: _expert(part, index, shape) for role, part in parts.items()}
            _fill(matrix, rows(packed, inner))
    else:
        _fill(result, rows(packed, parts))
    return result


def _expert(part: Any, index: int, shape: tuple[int, ...]) -> Any:
    """Return the part of one matrix of several; a scale for all of them stays as it is."""
    count = math.prod(shape[:-2])
    if part.numel() == 1:
        return part
    return part.reshape(count, *part.shape[len(shape) - 2 :])[index]


def _fill(result: Any, rows: _Rows) -> None:
    """Compute a matrix, or a vector of weights, by chunks."""
    count = result.shape[0]
    step = max(_CHUNK_ELEMENTS // max(result[0].numel(), 1) // 8 * 8, 8)
    for first in range(0, count, step):
        last = min(first + step, count)
        result[first:last] = rows(first, last)


def _gptq(packed: PackedWeight, parts: Mapping[str, Any]) -> _Rows:
    scales = parts["scales"].float()
    zeros = _bits(parts["zeros"].t(), packed.bits).t()
    if packed.adds_one:
        zeros = (zeros + 1) & ((1 << packed.bits) - 1)
    group = _groups(packed, parts, scales.shape[0])

    def rows(first: int, last: int) -> Any:
        values = _bits(parts["values"][:, first:last], packed.bits).float()
        return _scaled(values, zeros[:, first:last].float(), scales[:, first:last], group).t()

    return rows


def _awq(packed: PackedWeight, parts: Mapping[str, Any]) -> _Rows:
    import torch

    scales = parts["scales"].float()
    group = _groups(packed, parts, scales.shape[0])

    def rows(first: int, last: int) -> Any:
        words = slice(first // 8, -(-last // 8))
        columns = slice(words.start * 8, words.stop * 8)
        values = _awq_values(parts["values"][:, words]).float()
        zeros = torch.full((1, 1), 8.0).expand(scales.shape[0], values.shape[1])
        if "zeros" in parts:
            zeros = _awq_values(parts["zeros"][:, words]).float()
        return _scaled(values, zeros, scales[:, columns], group)[:, : last - first].t()

    return rows


def _awq_values(words: Any) -> Any:
    import torch

    shifts = torch.tensor([4 * place for place in _AWQ_ORDER], dtype=torch.int32)
    return ((words.to(torch.int32)[..., None] >> shifts) & 15).flatten(-2)


def _int32(packed: PackedWeight, parts: Mapping[str, Any]) -> _Rows:
    stored = [int(each) for each in parts["state"]]
    if stored != list(packed.shape):
        raise ValueError(f"its weight_shape is {stored}, not {list(packed.shape)}")
    middle = 1 << (packed.bits - 1)
    scales = parts["scales"].float().t()
    zeros = scales.new_full(scales.shape, middle)
    if "zeros" in parts:
        zeros = _padded_bits(parts["zeros"], packed.bits)[: scales.shape[1]].t().float()
    group = _groups(packed, parts, scales.shape[0])

    def rows(first: int, last: int) -> Any:
        values = _padded_bits(parts["values"][first:last].t(), packed.bits)[: packed.shape[1]]
        own = slice(first, last) if scales.shape[1] > 1 else slice(None)
        return _scaled(values.float(), zeros[:, own], scales[:, own], group).t()

    return rows


def _scaled(values: Any, zeros: Any, scales: Any, group: Any) -> Any:
    """Return (values - zeros) * scales; `values` (columns, rows), the others (groups, rows).

    `group` is the size of groups in order, else the group of each column.  Changes `values`.
    """
    if isinstance(group, int):
        found = values.view(scales.shape[0], group, -1)
        return found.sub_(zeros[:, None]).mul_(scales[:, None]).flatten(0, 1)
    return values.sub_(zeros[group]).mul_(scales[group])


def _grid(packed: PackedWeight, parts: Mapping[str, Any]) -> _Rows:
    import torch

    values = parts["values"]
    columns, (high, wide) = values.shape[-1], packed.block
    grid = (-(-values.shape[-2] // high), -(-columns // wide))
    scales = _scale(parts["scales"]).reshape(-1)
    if packed.parts["scales"].endswith(".SCB"):
        # bitsandbytes stores the largest absolute value of each row.
        scales = scales / 127
    scales = scales.expand(math.prod(grid)) if scales.numel() == 1 else scales
    scales = scales.reshape(grid)
    zeros = parts["zeros"].float().reshape(-1) if "zeros" in parts else None
    if zeros is not None:
        zeros = zeros.expand(math.prod(grid)) if zeros.numel() == 1 else zeros
        zeros = zeros.reshape(grid)

    def rows(first: int, last: int) -> Any:
        line = torch.arange(first, last) // high
        found = values[first:last].float()
        for table, change in ((zeros, torch.Tensor.sub_), (scales, torch.Tensor.mul_)):
            if table is None:
                continue
            if columns % wide == 0:
                change(found.view(last - first, -1, wide), table[line][..., None])
            else:
                change(found, table[line].repeat_interleave(wide, dim=1)[:, :columns])
        return found

    return rows


def _fp4(packed: PackedWeight, parts: Mapping[str, Any]) -> _Rows:
    scales = _scale(parts["scales"])
    if "factor" in parts:
        scales = scales * parts["factor"].float().reshape(())
    if "divisor" in parts:
        scales = scales / parts["divisor"].float().reshape(())

    def rows(first: int, last: int) -> Any:
        values = _fp4_values(parts["values"][first:last])
        return values * scales[first:last].repeat_interleave(packed.group_size, dim=1)

    return rows


def _experts(packed: PackedWeight, parts: Mapping[str, Any], dtype: Any) -> Any:
    """Return GPT-OSS's experts (experts, columns, rows), from (experts, rows, groups, bytes)."""
    import torch

    scales = _scale(parts["scales"])
    result = torch.empty(packed.shape, dtype=dtype)
    for index, blocks in enumerate(parts["values"]):

        def rows(first: int, last: int, blocks: Any = blocks, own: Any = scales[index]) -> Any:
            return (_fp4_values(blocks[first:last]) * own[first:last, :, None]).flatten(-2)

        _fill(result[index].t(), rows)
    return result


def _bnb4(packed: PackedWeight, parts: Mapping[str, Any]) -> _Rows:
    """Return a reader of blocks of the flat weight, two values a byte, the first one high."""
    import torch

    del packed
    state = _bnb_state(parts)
    shape, size = state.shape, state.block_size
    count = math.prod(shape)
    scales = parts["scales"].reshape(-1)
    if "nested_scales" in parts:
        outer = parts["nested_scales"].float().reshape(-1)
        inner = parts["nested_map"].float()[scales.to(torch.int64)]
        which = torch.arange(inner.numel()) // state.nested_block_size
        scales = inner * outer[which] + state.nested_offset
    scales = scales.float()
    if scales.numel() != -(-count // size):
        raise ValueError(f"it has {scales.numel()} scales for {count} weights in blocks of {size}")
    table = parts["map"].float().reshape(-1)
    if table.numel() != 16:
        raise ValueError(f"its table has {table.numel()} values, not 16")
    data = parts["values"].reshape(-1)
    wide = count // shape[0]

    def rows(first: int, last: int) -> Any:
        start, end = first * wide, last * wide
        pairs = data[start // 2 : -(-end // 2)].to(torch.int32)
        values = table[torch.stack((pairs >> 4, pairs & 15), dim=-1)].reshape(-1)
        values = values[start % 2 : start % 2 + end - start]
        return (values * scales[torch.arange(start, end) // size]).reshape(-1, *shape[1:])

    return rows


def _bnb_state(parts: Mapping[str, Any]) -> BnbState:
    data = bytes(parts["state"].reshape(-1)[: MAX_STATE_BYTES + 1].tolist())
    return read_bnb_state(data, 2 * parts["values"].numel())


def _bits(words: Any, bits: int) -> Any:
    """Return the values in the 32-bit words of each column, as one stream of bits, int32."""
    import torch

    if 32 % bits == 0:
        return _padded_bits(words, bits)
    words = words.to(torch.int64) & 0xFFFFFFFF
    count = words.shape[0] * 32 // bits
    place = torch.arange(count) * bits
    index, shift = place // 32, (place % 32)[:, None]
    after = torch.cat((words, torch.zeros_like(words[:1])))[index + 1]
    found = (words[index] >> shift) | (after << (32 - shift))
    return (found & ((1 << bits) - 1)).to(torch.int32)


def _padded_bits(words: Any, bits: int) -> Any:
    """Return the values in the words of each column; a word holds whole values only."""
    import torch

    shifts = (torch.arange(32 // bits, dtype=torch.int32) * bits).reshape(1, -1, 1)
    words = words.to(torch.int32)[:, None, :]
    return (words >> shifts).bitwise_and_((1 << bits) - 1).flatten(0, 1)


def _fp4_values(data: Any) -> Any:
    """Return the 4-bit floats in bytes, low half first, as float32."""
    import torch

    table = torch.tensor([*_FP4, *(-each for each in _FP4)])
    data = data.view(torch.uint8).to(torch.int32)
    return table[torch.stack((data & 15, data >> 4), dim=-1)].flatten(-2)


def _scale(scales: Any) -> Any:
    """Return scales as float32; bytes are exponents of two."""
    import torch

    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 127)
    return scales.float()


def _groups(packed: PackedWeight, parts: Mapping[str, Any], groups: int) -> Any:
    """Return the size of equal groups in order, else the group of each column.

    Raises ValueError for a group that does not exist.
    """
    import torch

    columns, size = packed.shape[1], packed.group_size
    ordered = (torch.arange(columns) // size).clamp(max=groups - 1)
    found = parts["groups"].to(torch.int64) if "groups" in parts else ordered
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= groups:
        raise ValueError(f"a column is in the group {low if low < 0 else high} of {groups}")
    if groups * size == columns and torch.equal(found, ordered):
        return size
    return found


_READERS: Mapping[str, Callable[[PackedWeight, Mapping[str, Any]], _Rows]] = {
    "gptq": _gptq,
    "awq": _awq,
    "int32": _int32,
    "grid": _grid,
    "fp4": _fp4,
    "bnb4": _bnb4,
}
