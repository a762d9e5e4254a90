"""The disk space that a conversion needs, and the bound of all conversions."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from catalog.convert.disk import converted_bytes, require_share, require_space, result_bytes
from core.errors import InsufficientDisk, RequestError
from tests.unit.catalog.builders import make_info

ONE_STEP = ("safetensors", "mlx")


def model(file: Path, parameters: int = 1000) -> ModelInfo:
    info = make_info(str(file))
    return replace(
        info,
        format="safetensors",
        architecture="llama",
        quantization="f32",
        size_bytes=4 * parameters,
        parameters=parameters,
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_space_is_checked_with_both_numbers(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = weights.with_name("made")
    big = model(weights, parameters=2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(6 * 2**30))
    require_space(big, target, "f32", ONE_STEP)
    with pytest.raises(InsufficientDisk, match=r"8\.2 GiB .* 6\.0 GiB are free"):
        require_space(big, target, "f32", ("pytorch", *ONE_STEP))
    for quantization in ("q4_k_m", "q8_0", "q2_k"):
        # The file that llama.cpp quantizes takes 4 GiB, the result up to 1.25 GiB.
        monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(5 * 2**30))
        with pytest.raises(InsufficientDisk, match=r"5\.5 GiB .* 5\.0 GiB are free"):
            require_space(big, target, quantization, ("safetensors", "gguf"))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(2**30))
    with pytest.raises(InsufficientDisk, match=r"1\.0 GiB are free"):
        require_space(big, target, "4bit", ONE_STEP)
    with pytest.raises(RequestError, match="does not exist"):
        require_space(big, weights.with_name("missing") / "made", "f32", ONE_STEP)


@pytest.mark.parametrize(
    ("changes", "quantization", "exporter", "needed"),
    [
        # The result, and 256 MiB to spare.
        ({"quantization": "f32"}, "f32", "auto", "4.2 GiB"),
        ({"quantization": "bf16"}, "f32", "auto", "4.2 GiB"),
        # A copy in f32 beside it.
        ({"quantization": "mixed"}, "f32", "auto", "8.2 GiB"),
        ({"quantization": "bf16"}, "f32", "torch", "8.2 GiB"),
        ({"quantization": "bf16", "architecture": "phi3"}, "f32", "auto", "8.2 GiB"),
        ({"quantization": "f32", "architecture": "phi3"}, "f32", "auto", "4.2 GiB"),
        # Embeddings stay in f32.
        ({"quantization": "bf16"}, "int4", "auto", "1.2 GiB"),
        ({"details": {"n_embd": 1024, "vocabulary_size": 2**17}}, "int4", "auto", "1.8 GiB"),
    ],
)
def test_space_for_onnx_counts_its_copies(
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    quantization: str,
    exporter: str,
    needed: str,
) -> None:
    source = replace(model(weights, parameters=2**30), **changes)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(2**29))
    with pytest.raises(InsufficientDisk, match=f"needs up to {re.escape(needed)} of disk space"):
        require_space(
            source, weights.with_name("made"), quantization, ("safetensors", "onnx"), exporter
        )


class Usage:
    """A disk with so much room."""

    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    ("quantization", "group_size", "expected"),
    [
        ("4bit", 64, 4.5),
        ("4bit", 32, 5.0),
        ("8bit", 128, 8.25),
        ("q4_k_m", 64, 4.9),
        ("f16", 64, 16.0),
        ("original", 64, 32.0),
    ],
)
def test_the_size_of_a_result_is_foreseen(
    weights: Path, quantization: str, group_size: int, expected: float
) -> None:
    source = model(weights, parameters=8 * 10**6)
    assert result_bytes(source, quantization, group_size) == int(expected * 10**6)


def test_all_conversions_together_are_bounded(tmp_path: Path) -> None:
    def place(folder: Path, size: int, *, is_converted: bool) -> None:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "weights.npz").write_bytes(bytes(size))
        if is_converted:
            (folder / "provenance.json").write_bytes(b"{}")

    place(tmp_path / "mlx-4bit" / "m", 1000, is_converted=True)
    place(tmp_path / "gguf-q8_0" / "m", 500, is_converted=True)
    place(tmp_path / "hub" / "m", 90_000, is_converted=False)
    assert converted_bytes(tmp_path) == 1504
    assert converted_bytes(tmp_path / "missing") == 0
    require_share(tmp_path, 496, 2000)
    with pytest.raises(InsufficientDisk, match=r"about 497 B .* of 1\.5 KiB.* allows 2\.0 KiB"):
        require_share(tmp_path, 497, 2000)
