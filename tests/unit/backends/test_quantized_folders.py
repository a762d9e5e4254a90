"""Folders with quantized weights: named, counted, sized and placed truthfully."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import EngineOptions, ModelInfo
from backends.hf.fit import TensorShape
from backends.hf.folder import read_folder, safetensors_header
from backends.hf.layout import dense_tensors, stored_weights
from backends.pytorch import loading
from backends.pytorch.backend import PytorchBackend
from backends.registry import load_backends
from core.errors import BrokenModel
from core.types import Capability
from tests.quantized import METHODS, mxfp4_rows

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "torch_dtype": "float16",
}


def folder_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Write a configuration of the method `name`; return the stored tensors of one matrix."""
    settings, make, _ = METHODS[name]
    config = {**CONFIG, "quantization_config": settings, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    weight = make(np.random.default_rng(1), (96, 64))
    base = "model.layers.0.mlp.up_proj"
    stored: dict[str, Any] = {f"{base}.{key}": value for key, value in weight.stored.items()}
    stored["model.embed_tokens.weight"] = torch.zeros(32, 64, dtype=torch.float16)
    return stored


def identify(folder: Path, stored: Mapping[str, Any], kind: str = "safetensors") -> ModelInfo:
    """Save the weights as safetensors or as a pickle, and describe the model."""
    if kind == "safetensors":
        save_file(dict(stored), folder / "model.safetensors")
        return load_backends()["safetensors"].identify(folder / "model.safetensors")
    torch.save(dict(stored), folder / "pytorch_model.bin")
    return PytorchBackend().identify(folder / "pytorch_model.bin")


@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_folder_is_named_and_counted(tmp_path: Path, name: str) -> None:
    info = identify(tmp_path, folder_of(tmp_path, name))
    assert info.quantization == METHODS[name][2]
    assert info.parameters == 96 * 64 + 32 * 64
    assert info.choice is not None
    assert info.choice.runtime == "pytorch"


@pytest.mark.parametrize("name", ["gptq", "awq", "bnb-nf4", "bnb-int8", "ct-int4"])
def test_a_pickle_of_quantized_weights_is_the_same_model(tmp_path: Path, name: str) -> None:
    info = identify(tmp_path, folder_of(tmp_path, name), "bin")
    assert (info.quantization, info.parameters) == (METHODS[name][2], 96 * 64 + 32 * 64)


@pytest.mark.parametrize(
    ("platform", "declared", "element_bytes"),
    [
        ("linux", "float16", 4), ("linux", "bfloat16", 4), ("darwin", "float16", 2),
        ("darwin", "bfloat16", 2), ("darwin", "float32", 4), ("darwin", None, 4),
    ],
)  # fmt: skip
def test_the_estimate_is_that_of_the_dequantized_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    declared: str | None,
    element_bytes: int,
) -> None:
    info = identify(tmp_path, folder_of(tmp_path, "awq", torch_dtype=declared))
    monkeypatch.setattr(sys, "platform", platform)
    needed = loading.estimate_torch(info, EngineOptions()).weights_bytes
    assert needed == info.parameters * element_bytes


def test_embedding_models_may_be_quantized(tmp_path: Path) -> None:
    info = identify(tmp_path, folder_of(tmp_path, "awq", architectures=["LlamaModel"]))
    assert info.capabilities == {Capability.EMBEDDING}
    assert (info.quantization, info.parameters) == ("awq-4bit", 96 * 64 + 32 * 64)


def test_a_method_that_cannot_be_read_is_named_before_the_pickle_that_it_made(
    tmp_path: Path,
) -> None:
    stored = folder_of(tmp_path, "awq", quantization_config={"quant_method": "torchao"})
    with pytest.raises(BrokenModel, match="TorchAO"):
        identify(tmp_path, {**stored, "odd": torch.nn.Linear(1, 1)}, "bin")


def test_gpt_oss_stays_packed_where_mlx_runs_it(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    weight = mxfp4_rows(np.random.default_rng(1), (2, 96, 64))
    base = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{base}{ending}": value for ending, value in weight.stored.items()}
    backend = load_backends()["safetensors"]
    info = identify(tmp_path, stored)
    assert (info.quantization, info.parameters) == ("mxfp4", 2 * 96 * 64)
    if load_backends()["mlx"].availability().is_available:
        assert info.choice is not None
        assert info.choice.runtime == "mlx"
        assert info.details["mlx_bits"] == 4
        assert backend.estimate(info, EngineOptions()).weights_bytes > 0


@pytest.mark.parametrize("name", METHODS)
def test_the_shapes_are_those_of_the_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(folder_of(tmp_path, name), path)
    stored = stored_weights(read_folder(tmp_path), [safetensors_header(path)])
    assert dense_tensors(stored.layout, stored.tensors) == {
        "model.embed_tokens.weight": TensorShape("F16", (32, 64)),
        "model.layers.0.mlp.up_proj.weight": TensorShape("F32", (96, 64)),
    }


@pytest.mark.parametrize(
    "state",
    [
        b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b"[" * 3000, b" " * 5000,
        b'{"shape": [96, 63], "blocksize": 64}', b'{"shape": [96, -64], "blocksize": 64}',
        b'{"shape": [96, 64], "blocksize": 0}', b'{"shape": [1e3, 64], "blocksize": 64}',
        b'{"shape": [96, 64], "blocksize": 64, "nested_offset": "x"}',
    ],
)  # fmt: skip
def test_a_state_that_lies_is_refused_at_the_scan(tmp_path: Path, state: bytes) -> None:
    stored = folder_of(tmp_path, "bnb-nf4")
    key = next(name for name in stored if "quant_state" in name)
    stored[key] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(BrokenModel, match="state"):
        identify(tmp_path, stored)


SETTINGS: tuple[Any, ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 1 << 62},
    {"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": {"(a+)+$": {"bits": 8}}},
    {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm" * 10**5},
    {"quant_method": "fp8", "weight_block_size": [1 << 62, 1 << 62]},
    {"quant_method": "fp8", "weight_block_size": [[[]]]},
    {"quant_method": "compressed-tensors", "format": ["pack-quantized"]},
    {"quant_method": "compressed-tensors", "config_groups": {str(n): {} for n in range(10**4)}},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            str(n): {"weights": {"num_bits": n % 8 + 1, "group_size": n + 1}} for n in range(10**4)
        },
    },
    {"quant_method": "modelopt", "quant_algo": {"a": 1}},
    {"quant_method": "mxfp4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": [], "load_in_8bit": {}},
    {"quant_method": None, "load_in_4bit": True},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "name", ["gptq", "awq", "fp8-blocks", "ct-int4", "bnb-nf4", "modelopt-nvfp4"]
)
def test_hostile_settings_are_refused_or_are_right(
    tmp_path: Path, name: str, settings: Any
) -> None:
    stored = folder_of(tmp_path, name, quantization_config=settings)
    found, message = 96 * 64 + 32 * 64, "config.json"
    try:
        found = identify(tmp_path, stored).parameters
    except BrokenModel as problem:
        message = problem.message
    assert found == 96 * 64 + 32 * 64
    assert "config.json" in message
