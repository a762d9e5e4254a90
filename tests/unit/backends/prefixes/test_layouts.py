"""The layouts of MLX, ONNX and PyTorch caches: blocks of one never fit another."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends.mlx.blocks import LayerBlocks
from backends.onnx.blocks import cache_layout
from backends.pytorch.rows import PackedRows


def mlx(shapes: tuple[tuple[int, int], ...], dtypes: tuple[str, ...]) -> str | None:
    model: Any = SimpleNamespace(cache_shapes=shapes, cache_dtypes=dtypes)
    return LayerBlocks(model).layout


def onnx(dtype: str, *shapes: tuple[int, int]) -> str:
    tensors = [SimpleNamespace(heads=heads, head_dim=width) for heads, width in shapes]
    session: Any = SimpleNamespace(
        layout=SimpleNamespace(cache=tensors), cache_dtype=np.dtype(dtype)
    )
    return cache_layout(session)


def pytorch(dtype: str, windows: list[int | None]) -> str:
    rows: Any = PackedRows.__new__(PackedRows)
    rows._dtype, rows._windows = dtype, windows
    layout: str = rows.layout
    return layout


def test_each_dtype_and_shape_of_mlx_has_a_layout_of_its_own() -> None:
    layouts = [
        mlx(((2, 16), (2, 16)), ("float16", "float16")),
        mlx(((2, 16), (2, 16)), ("float32", "float32")),
        mlx(((2, 16), (2, 16)), ("float16", "float32")),
        mlx(((2, 16), (2, 8)), ("float16", "float16")),
        mlx(((4, 16), (2, 16)), ("float16", "float16")),
        mlx(((2, 16),) * 4, ("float16",) * 4),
    ]
    assert len(set(layouts)) == len(layouts)
    # Caches that cannot be cut have no shapes.
    assert mlx((), ()) is None


def test_each_dtype_and_shape_of_onnx_has_a_layout_of_its_own() -> None:
    pytest.importorskip("onnxruntime")
    layouts = [
        onnx("float16", (2, 16), (2, 16)),
        onnx("float32", (2, 16), (2, 16)),
        onnx("float16", (2, 16)),
        onnx("float16", (16, 2), (16, 2)),
    ]
    assert len(set(layouts)) == len(layouts)


def test_each_dtype_and_window_of_pytorch_has_a_layout_of_its_own() -> None:
    pytest.importorskip("torch")
    layouts = [
        pytorch("torch.float32", [None, None]),
        pytorch("torch.bfloat16", [None, None]),
        pytorch("torch.float32", [None, 512]),
        pytorch("torch.float32", [512, None]),
    ]
    assert len(set(layouts)) == len(layouts)
