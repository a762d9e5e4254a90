"""A conversion that would fail, or give other text, is refused before it reads weights."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo, RuntimeChoice
from catalog.convert.choice import least_lossy_conversion
from catalog.convert.graph import check, conversions_from
from catalog.convert.steps.rotary import attention_window
from catalog.convert.support import step_reason
from core.errors import UnsupportedCapability
from core.types import Capability

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 320,
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": '"vocab": {'}],
    "pre_tokenizer": BYTE_LEVEL,
    "model": {"type": "BPE", "byte_fallback": False, "vocab": {"a": 0}, "merges": []},
}


def described(folder: Path, config: dict[str, Any], tokenizer: Any = TOKENIZER) -> ModelInfo:
    folder.mkdir(exist_ok=True)
    config = CONFIG | config
    (folder / "config.json").write_text(json.dumps(config))
    text = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
    (folder / "tokenizer.json").write_text(text)
    return ModelInfo(
        format="safetensors",
        name="tiny",
        architecture=config["model_type"],
        quantization="f32",
        files=(folder / "model.safetensors",),
        size_bytes=100,
        parameters=10,
        context_length=64,
        capabilities=frozenset({Capability.COMPLETION}),
    )


def reasons(info: ModelInfo) -> dict[str, str]:
    return {each.target_format: each.reason for each in conversions_from(info)}


def test_a_model_of_the_family_is_offered_in_every_format(tmp_path: Path) -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        info = described(tmp_path / model_type, {"model_type": model_type})
        assert set(reasons(info).values()) == {""}


@pytest.mark.parametrize(
    ("config", "targets", "reason"),
    [
        ({"model_type": "phi3"}, ("gguf", "coreml"), "architecture 'phi3'|type 'phi3'"),
        ({"model_type": "never-heard-of"}, ("mlx", "gguf", "onnx", "coreml"), "never-heard-of"),
        ({"hidden_act": "gelu"}, ("gguf", "coreml"), "activation 'gelu'"),
        ({"partial_rotary_factor": 0.5}, ("gguf", "coreml"), "partial rotary|part of each head"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            ("gguf", "coreml", "onnx"),
            "RoPE scaling 'yarn'",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ("gguf", "coreml", "onnx"),
            "RoPE scaling 'dynamic'",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, ("gguf",), "bias"),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 64}},
            ("gguf", "onnx", "coreml"),
            "larger model|architecture 'llava'|does not support",
        ),
        ({"num_attention_heads": "four"}, ("coreml",), "num_attention_heads"),
    ],
)
def test_what_a_step_would_convert_wrongly_is_refused_at_once(
    tmp_path: Path, config: dict[str, Any], targets: tuple[str, ...], reason: str
) -> None:
    info = described(tmp_path, config)
    found = reasons(info)
    for target in targets:
        assert re.search(reason, found[target]), (target, found[target])
        with pytest.raises(UnsupportedCapability, match=reason):
            check(info, target, "")
    chosen = least_lossy_conversion(info, ("mlx", "gguf", "onnx"))
    assert chosen is None or chosen[0] not in targets


def test_an_exporter_that_writes_f32_only_is_offered_for_that(tmp_path: Path) -> None:
    info = described(tmp_path, {"model_type": "phi3"})
    onnx = next(each for each in conversions_from(info) if each.target_format == "onnx")
    assert onnx.is_possible
    assert onnx.quantizations == ("f32",)
    with pytest.raises(UnsupportedCapability, match="'int4' is not one of f32"):
        check(info, "onnx", "int4")
    assert step_reason(info, "safetensors", "onnx", "int4").endswith("can be written in f32 only")


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (TOKENIZER | {"model": {"type": "Unigram", "vocab": []}}, "byte-level BPE"),
        (
            TOKENIZER | {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}},
            "byte-level BPE",
        ),
        (TOKENIZER | {"pre_tokenizer": {"type": "Whitespace"}}, "no known equivalent"),
        (TOKENIZER | {"pre_tokenizer": None}, "no known equivalent"),
    ],
)
def test_a_tokenizer_that_gguf_does_not_have_is_refused_at_once(
    tmp_path: Path, tokenizer: dict[str, Any], reason: str
) -> None:
    info = described(tmp_path, {}, tokenizer)
    assert reason in reasons(info)["gguf"]
    assert reasons(info)["mlx"] == ""


def test_a_folder_without_a_tokenizer_json_cannot_become_gguf(tmp_path: Path) -> None:
    info = described(tmp_path, {})
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    assert reasons(info)["gguf"] == "it has no tokenizer.json"
    assert reasons(info)["mlx"] == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 7}', '{"a": ' + "[" * 100_000])
def test_a_damaged_tokenizer_is_left_to_the_conversion(tmp_path: Path, text: str) -> None:
    assert step_reason(described(tmp_path, {}, text), "safetensors", "gguf") == ""


def test_only_the_start_of_a_tokenizer_is_read(tmp_path: Path) -> None:
    # What follows the vocabulary's name is not JSON, and is not looked at.
    start = json.dumps(TOKENIZER | {"pre_tokenizer": {"type": "Whitespace"}})
    cut = start.index('"vocab": {"a"')
    info = described(tmp_path, {}, start[:cut] + '"vocab": {"a": 0, ' + "\x00" * 50)
    assert "no known equivalent" in step_reason(info, "safetensors", "gguf")


@pytest.mark.parametrize(
    ("choice", "config", "reason"),
    [
        (None, {}, ""),
        (RuntimeChoice("mlx", "MLX supports the architecture"), {}, ""),
        (RuntimeChoice("pytorch", "wanted", "mlx", "slower"), {}, ""),
        (RuntimeChoice("pytorch", "MLX cannot run here: no wheel"), {}, ""),
        (RuntimeChoice("pytorch", "the MLX backend is not installed"), {}, ""),
        (RuntimeChoice("pytorch", "mlx-lm cannot load it: x."), {}, "mlx-lm cannot load it: x"),
        (RuntimeChoice("pytorch", "MLX computes it wrongly (y)"), {}, "computes it wrongly"),
        (
            RuntimeChoice("pytorch", "mlx-lm ignores its sliding window of 48 tokens"),
            {"sliding_window": 48},
            "",
        ),
    ],
)
def test_what_mlx_was_found_not_to_run_is_not_converted_to_it(
    tmp_path: Path, choice: RuntimeChoice | None, config: dict[str, Any], reason: str
) -> None:
    info = replace(described(tmp_path, config), choice=choice)
    found = reasons(info)["mlx"]
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("format", ["pytorch", "safetensors"])
def test_settings_that_mlx_does_not_read_are_told(tmp_path: Path, format: str) -> None:
    said = {"rope_scaling": {"rope_type": "never-heard-of", "factor": 2.0}}
    info = replace(described(tmp_path, said), format=format)
    assert "never-heard-of" in reasons(info)["mlx"]
    # The same code gave the same text when the folder was inspected.
    tried = replace(info, choice=RuntimeChoice("mlx", "compared with transformers"))
    assert reasons(tried)["mlx"] == ""
    window = replace(described(tmp_path, {"sliding_window": 48}), format=format)
    assert reasons(window)["mlx"] == ""


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    info = described(tmp_path, {})
    assert reasons(info)["gguf"] == ""
    described(tmp_path, {"hidden_act": "gelu_new_activation"})
    assert "gelu_new" in reasons(info)["gguf"]


def test_without_files_the_architecture_alone_decides(tmp_path: Path) -> None:
    info = replace(described(tmp_path, {}), files=(tmp_path / "gone" / "model.safetensors",))
    assert set(reasons(info).values()) == {""}
    assert "phi3" in reasons(replace(info, architecture="phi3"))["gguf"]


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 48}, 48),
        ({"model_type": "qwen2", "sliding_window": 48}, None),
        ({"model_type": "qwen2", "sliding_window": 48, "use_sliding_window": True}, 48),
        ({"model_type": "gemma2", "sliding_window": 48}, 48),
        ({"model_type": "gemma2", "sliding_window": 48, "layer_types": ["full_attention"]}, None),
        ({"model_type": "gemma2", "sliding_window": "48"}, None),
    ],
)
def test_windows_are_found_where_a_config_leaves_them_to_transformers(
    config: dict[str, Any], window: int | None
) -> None:
    assert attention_window(config) == window
