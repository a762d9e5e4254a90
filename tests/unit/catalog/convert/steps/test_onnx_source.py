"""Weights are made such that exporters map them from disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from catalog.convert.job import Job, link_source
from catalog.convert.steps.onnx_source import map_weights

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def write_folder(folder: Path, *dtypes: Any, declared: str, prefix: str = "") -> dict[str, Any]:
    """Write a tensor of each dtype, and one of integers."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {
        f"{prefix}model.layers.{index}.weight": torch.randn(3, 4).to(dtype)
        for index, dtype in enumerate(dtypes)
    }
    tensors[f"{prefix}model.ids"] = torch.arange(5)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": declared}))
    return tensors


def mapped(tmp_path: Path, folder: Path, *, in_f32: bool) -> tuple[Path, dict[str, Any]]:
    """Return the prepared weights and the configuration beside them."""
    work = tmp_path / "work"
    work.mkdir()
    files = (folder / "model.safetensors", folder / "config.json")
    job = Job("safetensors", "onnx", files, tmp_path / "out", work, "tiny", "f32")
    source = link_source(job)
    map_weights(job, source, in_f32=in_f32)
    return source / "model.safetensors", json.loads((source / "config.json").read_text())


@pytest.mark.parametrize(
    ("dtype", "declared", "in_f32", "stored"),
    [
        (F32, "float32", True, "float32"),
        (F32, "bfloat16", True, "float32"),
        (F32, "bfloat16", False, "float32"),
        (BF16, "bfloat16", False, "bfloat16"),
        (F16, "float32", False, "float16"),
    ],
)
def test_weights_of_one_type_are_linked_and_named_as_they_are(
    tmp_path: Path, dtype: Any, declared: str, in_f32: bool, stored: str
) -> None:
    write_folder(tmp_path / "model", dtype, declared=declared)
    weights, config = mapped(tmp_path, tmp_path / "model", in_f32=in_f32)
    assert weights.is_symlink()
    assert config["dtype"] == stored


@pytest.mark.parametrize(
    ("dtypes", "in_f32", "prefix"),
    [
        ((BF16,), True, ""),
        ((F16, F16), True, ""),
        ((BF16, F32), False, ""),
        ((F64,), False, ""),
        ((BF16, BF16), False, "module."),
    ],
)
def test_others_are_copied_to_f32_under_the_models_names(
    tmp_path: Path, dtypes: tuple[Any, ...], in_f32: bool, prefix: str
) -> None:
    wanted = write_folder(tmp_path / "model", *dtypes, declared="bfloat16", prefix=prefix)
    weights, config = mapped(tmp_path, tmp_path / "model", in_f32=in_f32)
    assert not weights.is_symlink()
    assert config["dtype"] == "float32"
    found = safetensors.load_file(weights)
    assert {f"{prefix}{name}" for name in found} == set(wanted)
    for name, tensor in found.items():
        original = wanted[f"{prefix}{name}"]
        is_floating = original.is_floating_point()
        assert tensor.dtype == (F32 if is_floating else original.dtype)
        assert torch.equal(tensor, original.to(tensor.dtype))
    # The source itself is as it was.
    assert safetensors.load_file(tmp_path / "model" / "model.safetensors").keys() == wanted.keys()
