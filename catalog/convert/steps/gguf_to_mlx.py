"""Converts GGUF to MLX with the quantized blocks unchanged, without loss of precision."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from catalog.convert.graph import MLX_BLOCKS
from catalog.convert.job import Job, Report, write_json
from catalog.convert.steps.from_gguf import (
    GgufSource,
    dequantized,
    open_gguf,
    unpermuted,
    write_tokenizer,
)
from catalog.convert.steps.gguf_config import hf_config, hf_name, unpermuted_heads
from catalog.convert.tensor_file import LazyTensor, head_rows, rows_at_once, write_tensors
from core.errors import UnsupportedCapability

# The elements of a block in both formats (Source: ggml-common.h, mlx/io/gguf_quants.cpp).
_GROUP = 32
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How a GGUF tensor type stores a block: its bytes, and which of them are what.

    MLX's value of an element is `element * scale + bias`, with `bias = offset * scale` where the
    block itself has none.
    """

    bits: int
    block_bytes: int
    data_start: int
    offset: int
    has_bias: bool = False


_Compute: TypeAlias = Callable[[NDArray[np.uint8], _Blocks], NDArray[Any]]

_BLOCKS = {
    "q4_0": _Blocks(bits=4, block_bytes=18, data_start=2, offset=-8),
    "q4_1": _Blocks(bits=4, block_bytes=20, data_start=4, offset=0, has_bias=True),
    "q8_0": _Blocks(bits=8, block_bytes=34, data_start=2, offset=-128),
}


def gguf_to_mlx(job: Job, report: Report) -> None:
    """Write an MLX folder whose weights are exactly equal to the GGUF file's.

    Scales are stored in f32, which represents f16 without loss.  Raises BrokenModel,
    UnsupportedCapability.
    """
    report(0.0, "reading the tokenizer")
    source = open_gguf(job)
    types = {_type_name(tensor) for tensor in source.tensors.values()} - MLX_BLOCKS
    if types:
        raise UnsupportedCapability(
            f"MLX does not support the tensor types {', '.join(sorted(types))}; "
            "choose a number of bits instead of original.",
            param="quantization",
        )
    config = hf_config(source.header, source.shapes(), source.rope_freqs())
    write_tokenizer(source, job.output)
    write_tensors(
        job.output,
        _mlx_tensors(source),
        metadata={"format": "mlx"},
        on_progress=lambda share: report(0.2 + 0.8 * share, "writing the weights"),
    )
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    if quantization := _quantization(source):
        config["quantization"] = config["quantization_config"] = quantization
    write_json(job.output / "config.json", config)
    report(1.0, "done")


def _type_name(tensor: Any) -> str:
    return str(tensor.tensor_type.name).lower()


def _mlx_tensors(source: GgufSource) -> Iterator[LazyTensor]:
    for gguf_name, shape in source.shapes().items():
        name = hf_name(gguf_name)
        if name is None:
            continue
        tensor, heads = source.tensors[gguf_name], unpermuted_heads(source.header, gguf_name)
        kind = _BLOCKS.get(_type_name(tensor))
        if kind is None:
            yield LazyTensor(name, "F32", shape, partial(dequantized, tensor, shape, heads))
            continue
        base = name.removesuffix(_WEIGHT)
        for part, dtype, columns, compute in (
            ("weight", "U32", shape[-1] * kind.bits // 32, _words),
            ("scales", "F32", shape[-1] // _GROUP, _scales),
            ("biases", "F32", shape[-1] // _GROUP, _biases),
        ):
            pieces = partial(_pieces, tensor, shape, heads, kind, compute)
            yield LazyTensor(f"{base}.{part}", dtype, (*shape[:-1], columns), pieces)


def _pieces(
    tensor: Any, shape: tuple[int, ...], heads: int, kind: _Blocks, compute: _Compute
) -> Iterator[NDArray[Any]]:
    for blocks in _rows_of_blocks(tensor, shape, heads, kind):
        yield np.ascontiguousarray(compute(blocks, kind))


def _rows_of_blocks(
    tensor: Any, shape: tuple[int, ...], heads: int, kind: _Blocks
) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of some rows, shape (rows, blocks of a row, bytes of a block)."""
    rows = head_rows(shape, heads) if heads else 1
    count = rows_at_once(shape, rows)
    for start in range(0, shape[0], count):
        data = np.array(tensor.data[start : start + count])
        blocks = data.reshape(len(data), -1, kind.block_bytes)
        yield unpermuted(blocks, rows) if heads else blocks


def _words(blocks: NDArray[np.uint8], kind: _Blocks) -> NDArray[np.uint8]:
    """Return the elements in MLX's order, the first in the lowest bits; as bytes."""
    data = blocks[..., kind.data_start :]
    if kind.bits == 8:
        # From signed to unsigned.
        return data ^ np.uint8(0x80)
    # A GGUF block has its first half in the low bits, its second half in the high bits.
    elements = np.concatenate((data & np.uint8(0x0F), data >> np.uint8(4)), axis=-1)
    words: NDArray[np.uint8] = elements[..., 0::2] | (elements[..., 1::2] << np.uint8(4))
    return words


def _scales(blocks: NDArray[np.uint8], kind: _Blocks) -> NDArray[np.float32]:
    del kind
    return _halves(blocks, 0)


def _biases(blocks: NDArray[np.uint8], kind: _Blocks) -> NDArray[np.float32]:
    return _halves(blocks, 2) if kind.has_bias else _halves(blocks, 0) * np.float32(kind.offset)


def _halves(blocks: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
    """Return the float16 at byte `start` of each block, as float32."""
    halves = np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]
    return halves.astype(np.float32)


def _quantization(source: GgufSource) -> dict[str, Any]:
    """Return mlx-lm's `quantization`: the most common bits, and each layer that differs."""
    bits = {
        (hf_name(name) or "").removesuffix(_WEIGHT): kind.bits
        for name, tensor in source.tensors.items()
        if (kind := _BLOCKS.get(_type_name(tensor))) is not None
    }
    if not bits:
        return {}
    common = Counter(bits.values()).most_common(1)[0][0]
    others: Mapping[str, object] = {
        layer: {"group_size": _GROUP, "bits": count}
        for layer, count in bits.items()
        if count != common
    }
    return {"group_size": _GROUP, "bits": common, "mode": "affine", **others}
