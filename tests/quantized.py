"""Makes quantized weights of every method from random numbers, with the weights they stand for.

The expected weights are computed with NumPy, element by element where a layout is intricate, and
share no code with the server.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.linspace(-1, 1, 16, dtype=np.float32) ** 3


@dataclass(frozen=True, slots=True)
class Quantized:
    """One weight: what is stored, by the ending of its name, and what it stands for."""

    stored: Mapping[str, Any]
    expected: np.ndarray[Any, Any]


def _words(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Pack each row into 32-bit words, as one stream of bits with the first value lowest."""
    rows = []
    for row in values:
        number = 0
        for index, value in enumerate(row):
            number |= int(value) << (bits * index)
        count = -(-len(row) * bits // 32)
        rows.append([number >> (32 * word) & 0xFFFFFFFF for word in range(count)])
    return np.array(rows, np.uint32).view(np.int32)


def _padded_words(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Pack each row into 32-bit words of whole values."""
    each = 32 // bits
    parts = [_words(values[:, at : at + each], bits) for at in range(0, values.shape[1], each)]
    return np.concatenate(parts, axis=1)


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _float8(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Any]:
    import torch

    values = torch.from_numpy(generator.normal(0, 20, shape)).to(torch.float8_e4m3fn)
    return values, values.float().numpy()


def _scales(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return generator.uniform(0.001, 0.02, shape).astype(np.float16)


def gptq(
    generator: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 16,
    is_ordered: bool = False,
    has_index: bool = True,
    is_second: bool = False,
) -> Quantized:
    """GPTQ: `is_ordered` is `desc_act`; `is_second` stores zero points as they are."""
    rows, columns = shape
    size = columns if group == -1 else group
    groups = -(-columns // size)
    index = np.arange(columns) // size
    if is_ordered:
        index = generator.permutation(index)
    values = generator.integers(0, 1 << bits, (columns, rows))
    zeros = generator.integers(1, 1 << bits, (groups, rows))
    scales = _scales(generator, (groups, rows))
    expected = (values - zeros[index]) * scales[index].astype(np.float32)
    stored = {
        "qweight": _tensor(_words(values.T, bits).T),
        "qzeros": _tensor(_words(zeros if is_second else zeros - 1, bits)),
        "scales": _tensor(scales),
    }
    if has_index:
        stored["g_idx"] = _tensor(index.astype(np.int32))
    return Quantized(stored, expected.T.astype(np.float32))


def awq(generator: np.random.Generator, shape: tuple[int, int], *, group: int = 16) -> Quantized:
    """AutoAWQ's `gemm` layout."""
    rows, columns = shape
    groups = columns // group
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    values = generator.integers(0, 16, (columns, rows))
    zeros = generator.integers(0, 16, (groups, rows))
    scales = _scales(generator, (groups, rows))

    def packed(table: np.ndarray[Any, Any]) -> Any:
        shuffled = table.reshape(len(table), -1, 8)[:, :, order].reshape(len(table), -1)
        return _tensor(_words(shuffled, 4))

    index = np.arange(columns) // group
    expected = (values - zeros[index]) * scales[index].astype(np.float32)
    stored = {"qweight": packed(values), "qzeros": packed(zeros), "scales": _tensor(scales)}
    return Quantized(stored, expected.T.astype(np.float32))


def bnb4(
    generator: np.random.Generator, shape: tuple[int, int], *, is_nested: bool = True
) -> Quantized:
    """bitsandbytes' NF4, with or without quantized scales."""
    import torch

    count = shape[0] * shape[1]
    values = generator.integers(0, 16, count)
    blocks = count // 64
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(shape),
    }  # fmt: skip
    stored: dict[str, Any] = {
        "weight": _tensor((values[::2] << 4 | values[1::2]).astype(np.uint8)[:, None]),
        "weight.quant_map": _tensor(NF4.copy()),
    }
    if is_nested:
        nested = np.sort(generator.uniform(-1, 1, 256)).astype(np.float32)
        codes = generator.integers(0, 256, blocks).astype(np.uint8)
        outer = generator.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
        scales = nested[codes] * outer[np.arange(blocks) // 256] + np.float32(0.03)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
        stored |= {
            "weight.absmax": _tensor(codes),
            "weight.nested_absmax": _tensor(outer),
            "weight.nested_quant_map": _tensor(nested),
        }
    else:
        scales = generator.uniform(0.01, 0.05, blocks).astype(np.float32)
        stored["weight.absmax"] = _tensor(scales)
    text = json.dumps(state).encode()
    stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    expected = NF4[values] * scales[np.arange(count) // 64]
    return Quantized(stored, expected.reshape(shape).astype(np.float32))


def bnb8(generator: np.random.Generator, shape: tuple[int, int]) -> Quantized:
    """bitsandbytes' LLM.int8()."""
    import torch

    values = generator.integers(-127, 128, shape).astype(np.int8)
    maxima = generator.uniform(0.05, 0.2, shape[0]).astype(np.float32)
    stored = {
        "weight": _tensor(values),
        "SCB": _tensor(maxima),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Quantized(stored, values * maxima[:, None] / np.float32(127))


def float8(
    generator: np.random.Generator,
    shape: tuple[int, int],
    *,
    block: tuple[int, int] | None,
    name: str = "weight_scale_inv",
    is_exponent: bool = False,
) -> Quantized:
    """FP8 with one scale a block, or one in all; `is_exponent` stores powers of two as bytes."""
    import torch

    stored, values = _float8(generator, shape)
    high, wide = block or shape
    grid = (-(-shape[0] // high), -(-shape[1] // wide))
    scales = generator.uniform(0.0005, 0.002, grid).astype(np.float32)
    table = _tensor(scales)
    if is_exponent:
        exponents = generator.integers(114, 120, grid).astype(np.uint8)
        scales, table = 2.0 ** (exponents.astype(np.float32) - 127), _tensor(exponents)
    elif block is None:
        table = table.reshape(())
    spread = np.repeat(np.repeat(scales, high, 0), wide, 1)[: shape[0], : shape[1]]
    extra = {"input_scale": torch.tensor(1.0)} if block is None else {}
    return Quantized({"weight": stored, name: table, **extra}, (values * spread).astype(np.float32))


def int32(
    generator: np.random.Generator,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 16,
    is_symmetric: bool = True,
    is_ordered: bool = False,
) -> Quantized:
    """compressed-tensors' `pack-quantized`; group -1 has one scale a row."""
    import torch

    rows, columns = shape
    size = columns if group == -1 else group
    groups, middle = columns // size, 1 << (bits - 1)
    values = generator.integers(-middle, middle, shape)
    zeros = generator.integers(-middle, middle, (rows, groups))
    zeros = zeros * 0 if is_symmetric else zeros
    scales = _scales(generator, (rows, groups))
    index = np.arange(columns) // size
    index = generator.permutation(index) if is_ordered else index
    expected = (values - zeros[:, index]) * scales[:, index].astype(np.float32)
    stored = {
        "weight_packed": _tensor(_padded_words(values + middle, bits)),
        "weight_scale": _tensor(scales),
        "weight_shape": torch.tensor(shape),
    }
    if not is_symmetric:
        stored["weight_zero_point"] = _tensor(_padded_words(zeros.T + middle, bits).T)
    if is_ordered:
        stored["weight_g_idx"] = _tensor(index.astype(np.int32))
    return Quantized(stored, expected.astype(np.float32))


def int8(generator: np.random.Generator, shape: tuple[int, int]) -> Quantized:
    """compressed-tensors' `int-quantized` with one scale and zero point a row."""
    values = generator.integers(-128, 128, shape).astype(np.int8)
    scales = _scales(generator, (shape[0], 1))
    zeros = generator.integers(-8, 8, (shape[0], 1)).astype(np.int8)
    stored = {
        "weight": _tensor(values),
        "weight_scale": _tensor(scales),
        "weight_zero_point": _tensor(zeros),
    }
    expected = (values.astype(np.float32) - zeros) * scales.astype(np.float32)
    return Quantized(stored, expected)


def nvfp4(
    generator: np.random.Generator, shape: tuple[int, int], *, is_modelopt: bool
) -> Quantized:
    """NVFP4 as ModelOpt (a factor) or compressed-tensors (a divisor) stores it."""
    import torch

    values = generator.integers(0, 16, shape)
    stored = _tensor((values[:, ::2] | values[:, 1::2] << 4).astype(np.uint8))
    scale, plain = _float8(generator, (shape[0], shape[1] // 16))
    whole = np.float32(0.0005)
    expected = FP4[values] * np.repeat(plain * whole, 16, axis=1)
    if is_modelopt:
        parts = {"weight": stored, "weight_scale": scale, "weight_scale_2": torch.tensor(whole)}
    else:
        whole = np.float32(1) / whole
        expected = FP4[values] * np.repeat(plain / whole, 16, axis=1)
        parts = {
            "weight_packed": stored,
            "weight_scale": scale,
            "weight_global_scale": torch.tensor([whole]),
        }
    return Quantized(parts, expected.astype(np.float32))


def mxfp4_rows(generator: np.random.Generator, shape: tuple[int, ...]) -> Quantized:
    """The blocks of GPT-OSS: 32 four-bit floats and an exponent, along the last axis."""
    values = generator.integers(0, 16, shape)
    pairs = (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8)
    exponents = generator.integers(116, 122, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    expected = FP4[values] * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, axis=-1)
    stored = {
        "_blocks": _tensor(pairs.reshape(*exponents.shape, 16)),
        "_scales": _tensor(exponents),
    }
    return Quantized(stored, expected.astype(np.float32))


Maker = Callable[[np.random.Generator, tuple[int, int]], Quantized]


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


def _gptq(bits: int = 4, group: int = 16, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, **more}


# Name: (quantization_config, maker, name in the catalog).
METHODS: Mapping[str, tuple[dict[str, Any], Maker, str]] = {
    "gptq": (_gptq(desc_act=False), gptq, "gptq-4bit"),
    "gptq-act-order": (
        _gptq(desc_act=True), lambda g, s: gptq(g, s, is_ordered=True), "gptq-4bit",
    ),
    "gptq-no-index": (_gptq(), lambda g, s: gptq(g, s, has_index=False), "gptq-4bit"),
    "gptq-2bit": (_gptq(2), lambda g, s: gptq(g, s, bits=2), "gptq-2bit"),
    "gptq-3bit": (_gptq(3), lambda g, s: gptq(g, s, bits=3), "gptq-3bit"),
    "gptq-8bit-column": (
        _gptq(8, -1), lambda g, s: gptq(g, s, bits=8, group=-1), "gptq-8bit",
    ),
    "gptq-v2": (
        _gptq(checkpoint_format="gptq_v2"), lambda g, s: gptq(g, s, is_second=True), "gptq-4bit",
    ),
    "autoround": (
        _gptq() | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        gptq, "gptq-4bit",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq, "awq-4bit",
    ),
    "bnb-nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        bnb4, "bnb-4bit",
    ),
    "bnb-nf4-plain-scales": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda g, s: bnb4(g, s, is_nested=False), "bnb-4bit",
    ),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8, "bnb-8bit"),
    "fp8-blocks": (
        {"quant_method": "fp8", "weight_block_size": [24, 40]},
        lambda g, s: float8(g, s, block=(24, 40)), "fp8",
    ),
    "fp8-tensor": ({"quant_method": "fp8"}, lambda g, s: float8(g, s, block=None), "fp8"),
    "fp8-mistral": (
        {"quant_method": "fp8"}, lambda g, s: float8(g, s, block=None, name="qscale_weight"), "fp8",
    ),
    "fbgemm-fp8": (
        {"quant_method": "fbgemm_fp8"},
        lambda g, s: float8(g, s, block=(1, s[1]), name="weight_scale"), "fp8",
    ),
    "mxfp8": (
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
        lambda g, s: float8(g, s, block=(1, 32), is_exponent=True), "mxfp8",
    ),
    "modelopt-fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda g, s: float8(g, s, block=None, name="weight_scale"), "fp8",
    ),
    "modelopt-nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        lambda g, s: nvfp4(g, s, is_modelopt=True), "nvfp4",
    ),
    "ct-int4": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        int32, "compressed-tensors-4bit",
    ),
    "ct-int4-asymmetric": (
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
        lambda g, s: int32(g, s, group=32, is_symmetric=False), "compressed-tensors-4bit",
    ),
    "ct-int4-act-order": (
        _compressed("pack-quantized", num_bits=4, group_size=16, actorder="group"),
        lambda g, s: int32(g, s, is_ordered=True), "compressed-tensors-4bit",
    ),
    "ct-int8-channel": (
        _compressed("pack-quantized", num_bits=8, strategy="channel", group_size=None),
        lambda g, s: int32(g, s, bits=8, group=-1), "compressed-tensors-8bit",
    ),
    "ct-int3": (
        _compressed("pack-quantized", num_bits=3, group_size=16),
        lambda g, s: int32(g, s, bits=3, is_symmetric=False), "compressed-tensors-3bit",
    ),
    "ct-w8a8": (
        _compressed("int-quantized", num_bits=8, strategy="channel"),
        int8, "compressed-tensors-8bit",
    ),
    "ct-fp8": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda g, s: float8(g, s, block=(1, s[1]), name="weight_scale"), "compressed-tensors-8bit",
    ),
    "ct-nvfp4": (
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        lambda g, s: nvfp4(g, s, is_modelopt=False), "compressed-tensors-4bit",
    ),
}  # fmt: skip
