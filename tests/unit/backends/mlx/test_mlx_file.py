"""Identifying MLX models, and rejecting malicious configurations."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import EngineOptions
from backends.mlx.backend import MlxBackend
from backends.mlx.model import check_config, supports
from core.errors import BrokenModel, InsufficientMemory, NotThisFormat

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
}
TENSORS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("F16", (32, 64)),
    "model.norm.weight": ("F16", (64,)),
}
PACKED: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("U32", (32, 8)),
    "model.embed_tokens.scales": ("F16", (32, 1)),
    "model.embed_tokens.biases": ("F16", (32, 1)),
    "model.norm.weight": ("F16", (64,)),
}
SIZES = {"F16": 2, "U32": 4}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


def write_model(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = TENSORS,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    metadata = {"format": "mlx"} if metadata is None else metadata
    return write_safetensors(folder / "model.safetensors", tensors, metadata)


def test_safetensors_that_mlx_made_are_recognised(tmp_path: Path) -> None:
    info = MlxBackend().identify(write_model(tmp_path))
    assert info.format == "mlx"
    assert info.architecture == "llama"
    assert info.quantization == "f16"
    assert info.parameters == 32 * 64 + 64
    assert info.context_length == 4096
    assert info.files[0] == tmp_path / "model.safetensors"


def test_packed_weights_count_as_what_they_stand_for(tmp_path: Path) -> None:
    quantization = {"group_size": 64, "bits": 4}
    config = {**CONFIG, "quantization": quantization}
    info = MlxBackend().identify(write_model(tmp_path, config, PACKED, {"format": "pt"}))
    assert info.quantization == "4bit"
    assert info.parameters == 32 * 64 + 64
    assert info.details["mlx_group_size"] == 64


def test_a_layer_with_a_group_size_of_its_own_is_counted_with_it(tmp_path: Path) -> None:
    quantization = {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    config = {**CONFIG, "quantization": quantization}
    assert MlxBackend().identify(write_model(tmp_path, config, PACKED)).parameters == 32 * 32 + 64


@pytest.mark.parametrize("group_size", [0, -64, 10**9, "64", [], 2.5, True])
def test_an_impossible_group_size_is_refused(tmp_path: Path, group_size: Any) -> None:
    config = {**CONFIG, "quantization": {"group_size": group_size, "bits": 4}}
    with pytest.raises(BrokenModel, match="group_size"):
        MlxBackend().identify(write_model(tmp_path, config, PACKED))


def test_rerankers_and_unknown_modules_are_refused_at_the_scan(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    with pytest.raises(BrokenModel, match="no reranking models"):
        MlxBackend().identify(write_model(tmp_path, config))
    modules = [{"path": "", "type": "sentence_transformers.models.LSTM"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BrokenModel, match="LSTM"):
        MlxBackend().identify(write_model(tmp_path, {**CONFIG, "architectures": ["LlamaModel"]}))


def test_every_shard_gives_the_same_answer(tmp_path: Path) -> None:
    write_model(tmp_path).unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, tensor in zip(names, TENSORS, strict=True):
        write_safetensors(tmp_path / name, {tensor: TENSORS[tensor]}, {"format": "mlx"})
    first, second = (MlxBackend().identify(tmp_path / name) for name in names)
    assert first == second
    assert [path.name for path in first.files[:2]] == names
    assert first.parameters == 32 * 64 + 64


def test_safetensors_of_others_are_left_to_them(tmp_path: Path) -> None:
    path = write_model(tmp_path, metadata={"format": "pt"})
    with pytest.raises(NotThisFormat):
        MlxBackend().identify(path)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "model.gguf"])
def test_other_files_are_left_to_others(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    with pytest.raises(NotThisFormat):
        MlxBackend().identify(tmp_path / name)


def test_weights_without_a_config_are_left_to_others(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(NotThisFormat):
        MlxBackend().identify(path)


@pytest.mark.parametrize("place", ["outer", "inner"])
def test_code_beside_the_weights_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    extra: dict[str, Any] = {"model_file": "evil.py"}
    config = {**CONFIG, **(extra if place == "outer" else {"text_config": {**CONFIG, **extra}})}
    path = write_model(tmp_path, config)
    with pytest.raises(BrokenModel, match="Python code"):
        MlxBackend().identify(path)
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_after_identifying_is_refused_too(tmp_path: Path) -> None:
    info = MlxBackend().identify(write_model(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_file": "evil.py"}))
    with pytest.raises(BrokenModel, match="Python code"):
        MlxBackend().open(info, EngineOptions())


@pytest.mark.parametrize("model_type", ["bert", "base", "cache", "../llama", "os.path", "", "no"])
def test_architectures_without_code_are_named(tmp_path: Path, model_type: str) -> None:
    assert not supports(model_type)
    path = write_model(tmp_path, {**CONFIG, "model_type": model_type})
    with pytest.raises(BrokenModel, match="architecture"):
        MlxBackend().identify(path)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma3_text", "gpt_oss"])
def test_known_architectures_are_found_without_importing_mlx(model_type: str) -> None:
    before = set(sys.modules)
    assert MlxBackend().supports(model_type)
    assert not {name for name in set(sys.modules) - before if name.startswith("mlx")}


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, {**CONFIG, "num_hidden_layers": 4000})
    with pytest.raises(BrokenModel, match="layers"):
        MlxBackend().identify(path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "n_layers"])
def test_endless_building_is_refused(key: str) -> None:
    with pytest.raises(BrokenModel, match=key):
        check_config({"text_config": {key: 10**9}})


def test_the_estimate_lowers_the_context_and_then_refuses(tmp_path: Path) -> None:
    info = MlxBackend().identify(write_model(tmp_path))
    whole = MlxBackend().estimate(info, EngineOptions())
    assert whole.context_tokens == 4096
    room = whole.total_bytes - whole.kv_bytes - whole.prefix_bytes
    half = EngineOptions(memory_limit_bytes=room + whole.kv_bytes // 4)
    assert 0 < MlxBackend().estimate(info, half).context_tokens < 4096
    with pytest.raises(InsufficientMemory, match="does not fit"):
        MlxBackend().estimate(info, EngineOptions(memory_limit_bytes=room // 2))


def test_npz_weights_beside_a_tokenizer_are_recognised(tmp_path: Path) -> None:
    write_model(tmp_path).unlink()
    arrays = {"norm.weight": np.ones(64, np.float16), "embed.weight": np.ones((32, 64), np.float16)}
    np.savez(tmp_path / "weights.npz", **arrays)  # type: ignore[arg-type]
    info = MlxBackend().identify(tmp_path / "weights.npz")
    assert info.format == "mlx"
    assert info.quantization == "f16"
    assert info.parameters == 32 * 64 + 64
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(NotThisFormat):
        MlxBackend().identify(tmp_path / "weights.npz")
