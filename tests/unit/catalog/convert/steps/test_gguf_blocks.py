"""GGUF's blocks and rows are what MLX and Hugging Face expect, bit for bit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.gguf.header import GgufFile
from catalog.convert.steps import from_gguf, gguf_to_mlx
from catalog.convert.steps.from_gguf import dequantized, unpermuted
from catalog.convert.steps.to_gguf import _permuted
from core.errors import BrokenModel

gguf = pytest.importorskip("gguf")
ROWS, COLUMNS = 8, 96


def quantized(kind: str) -> tuple[Any, NDArray[np.float32]]:
    """Return a tensor as gguf-py reads it, and its values."""
    values = np.random.default_rng(3).standard_normal((ROWS, COLUMNS), np.float32)
    tensor_type = gguf.GGMLQuantizationType[kind]
    data = values if kind == "F32" else gguf.quants.quantize(values, tensor_type)
    tensor = SimpleNamespace(data=data, tensor_type=tensor_type, shape=np.array([COLUMNS, ROWS]))
    return tensor, gguf.quants.dequantize(data, tensor_type)


def mlx_values(tensor: Any, kind: str, heads: int = 0) -> NDArray[np.float32]:
    """Return what MLX computes from the converted parts: elements times scales plus biases."""
    layout = gguf_to_mlx._BLOCKS[kind.lower()]
    parts = [
        np.concatenate(list(gguf_to_mlx._pieces(tensor, (ROWS, COLUMNS), heads, layout, compute)))
        for compute in (gguf_to_mlx._words, gguf_to_mlx._scales, gguf_to_mlx._biases)
    ]
    words = parts[0].reshape(ROWS, -1).view("<u4")
    shifts = np.arange(0, 32, layout.bits, dtype=np.uint32)
    elements = (words[..., None] >> shifts) & np.uint32(2**layout.bits - 1)
    elements = elements.reshape(ROWS, -1, 32).astype(np.float32)
    values: NDArray[np.float32] = elements * parts[1][..., None] + parts[2][..., None]
    return values.reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_have_the_same_values_in_mlx(kind: str) -> None:
    tensor, expected = quantized(kind)
    assert np.abs(mlx_values(tensor, kind) - expected).max() < 1e-6


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_the_rows_of_heads_are_put_back_in_order(kind: str) -> None:
    tensor, values = quantized(kind)
    (whole,) = dequantized(tensor, (ROWS, COLUMNS), 2)
    assert np.array_equal(_permuted(whole, ROWS // 2), values)
    assert np.abs(mlx_values(tensor, kind, heads=2) - whole).max() < 1e-6


def test_permuting_is_undone_head_by_head() -> None:
    rows = np.arange(24 * 2).reshape(24, 2)
    assert np.array_equal(unpermuted(_permuted(rows, 8), 8), rows)
    one = _permuted(rows[:8], 8)
    assert one[:4].tolist() == [[0, 1], [8, 9], [2, 3], [10, 11]]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tensor, expected = quantized(kind)
    monkeypatch.setattr(from_gguf, "rows_at_once", lambda *_: 3)
    pieces = list(dequantized(tensor, (ROWS, COLUMNS), 0))
    assert [len(piece) for piece in pieces] == [3, 3, 2]
    assert np.array_equal(np.concatenate(pieces), expected)


def test_rows_that_no_heads_fit_are_refused() -> None:
    tensor, _ = quantized("Q8_0")
    for heads in (3, ROWS, ROWS + 1):
        with pytest.raises(BrokenModel, match=f"cannot be split into {heads} heads"):
            list(dequantized(tensor, (ROWS, COLUMNS), heads))
        with pytest.raises(BrokenModel, match=f"cannot be split into {heads} heads"):
            mlx_values(tensor, "Q8_0", heads)


def test_generation_settings_come_from_the_header() -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.bos_token_id": 1,
        "general.sampling.temp": float(np.float32(0.6)),
        "general.sampling.top_k": 20,
        "general.sampling.top_p": "much",
    }
    header = GgufFile(SimpleNamespace(name="m.gguf"), 0, metadata, {})  # type: ignore[arg-type]
    made = from_gguf._generation_config(header, (3, 7, 9))
    assert made == {
        "bos_token_id": 1, "eos_token_id": [7, 3, 9], "temperature": 0.6, "top_k": 20,
        "do_sample": True,
    }  # fmt: skip
    bare = GgufFile(SimpleNamespace(name="m.gguf"), 0, {}, {})  # type: ignore[arg-type]
    assert from_gguf._generation_config(bare, (4,)) == {"eos_token_id": 4}
