"""Models with quantized weights answer as the same models with the weights that those stand for."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from backends.base import EngineOptions
from backends.hf.folder import read_folder
from backends.pytorch.backend import PytorchBackend
from backends.pytorch.loading import load_model
from backends.registry import load_backends
from backends.safetensors import SafetensorsBackend
from core.types import TokenPrompt
from tests.onnx_files import VOCABULARY, write_tokenizer
from tests.quantized import METHODS, mxfp4_rows
from tests.requests import request, run, token_ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS = EngineOptions(max_sequences=2, threads=1, context_tokens=64, kv_tokens=256)
PROMPT = TokenPrompt(tuple(range(8, 48)))
# Two key-value heads, so that no matrix is square.
LLAMA = {
    "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def dense(
    model_type: str, vocabulary: int, **sizes: Any
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return a configuration and random weights of a model that transformers builds."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = revert_weight_conversion(model, model.state_dict())
    weights = {name: value.clone() for name, value in state.items()}
    architectures = [type(model).__name__]
    return {**config.to_dict(), "architectures": architectures, "dtype": "float16"}, weights


def save(folder: Path, tokenizer: Path, config: Mapping[str, Any], weights: Any) -> Path:
    """Write a model folder; return its weight file."""
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copy(tokenizer / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder / "model.safetensors"


async def tokens(path: Path, runtime: str = "pytorch") -> tuple[list[int], str]:
    """Return 16 greedy tokens and the runtime that the scan chose."""
    backend = SafetensorsBackend(load_backends().get)
    info = backend.check_runtimes(backend.identify(path), (), lambda _: None)
    assert info.choice is not None
    engine = backend.open(info, replace(OPTIONS, runtime=runtime))
    events = await run(engine, request(PROMPT, max_tokens=16))
    await engine.close()
    return token_ids_of(events), info.choice.runtime


def quantized(
    name: str, model_type: str, vocabulary: int, **sizes: Any
) -> tuple[dict[str, Any], Any, Any]:
    """Return a configuration, quantized weights of the method `name`, and what they stand for."""
    settings, make, _ = METHODS[name]
    config, plain = dense(model_type, vocabulary, **sizes)
    generator = np.random.default_rng(5)
    packed: dict[str, Any] = {}
    for key, value in list(plain.items()):
        if "proj.weight" not in key:
            packed[key] = value.half()
            plain[key] = packed[key].float()
            continue
        weight = make(generator, tuple(value.shape))
        plain[key] = torch.from_numpy(weight.expected.copy())
        base = key.removesuffix("weight")
        packed |= {base + ending: stored for ending, stored in weight.stored.items()}
    return {**config, "quantization_config": settings}, packed, plain


async def assert_same_logits(
    place: Path,
    tokenizer: Path,
    config: Mapping[str, Any],
    packed: Any,
    plain: Any,
    *,
    is_pickle: bool = False,
) -> None:
    """Compare the logits of quantized weights with those of the weights that they stand for."""
    ids = torch.arange(40)[None]
    found: list[Any] = []
    for weights in (plain, packed):
        settings = config["quantization_config"] if weights is packed else None
        changed = {**config, "quantization_config": settings}
        path = save(place / str(len(found)), tokenizer, changed, weights)
        backend: SafetensorsBackend | PytorchBackend = SafetensorsBackend(load_backends().get)
        if is_pickle:
            path.unlink()
            path, backend = path.with_name("pytorch_model.bin"), PytorchBackend()
            torch.save({"module": weights}, path)
        info = backend.check_runtimes(backend.identify(path), (), lambda _: None)
        assert weights is plain or info.choice is None or info.choice.runtime == "pytorch"
        assert info.parameters == sum(value.numel() for value in plain.values())
        with torch.inference_mode():
            found.append(load_model(info, read_folder(path.parent))(ids).logits)
    assert found[0].std() > 0.01
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_computes_what_its_weights_stand_for(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    config, packed, plain = quantized(name, "llama", 512, tie_word_embeddings=False, **LLAMA)
    await assert_same_logits(tmp_path, tokenizer, config, packed, plain)


async def test_quantized_weights_answer_as_those_they_stand_for(
    tmp_path: Path, tokenizer: Path
) -> None:
    sizes = {"tie_word_embeddings": False, **LLAMA}
    config, packed, plain = quantized("gptq-act-order", "llama", VOCABULARY, **sizes)
    found, chosen = await tokens(save(tmp_path / "packed", tokenizer, config, packed))
    config = {**config, "quantization_config": None}
    whole, _ = await tokens(save(tmp_path / "dense", tokenizer, config, plain))
    assert chosen == "pytorch"
    assert found == whole
    assert len(set(found)) > 1


async def test_gpt_oss_answers_alike_packed_on_mlx_and_dequantized_on_pytorch(
    tmp_path: Path, tokenizer: Path
) -> None:
    config, plain = dense(
        "gpt_oss", VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        head_dim=32, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16, max_position_embeddings=128, layer_types=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    generator = np.random.default_rng(6)
    packed: dict[str, Any] = {}
    for key, value in list(plain.items()):
        if not key.endswith("_up_proj") and not key.endswith("down_proj"):
            packed[key] = value
            continue
        experts, columns, rows = value.shape
        weight = mxfp4_rows(generator, (experts, rows, columns))
        plain[key] = torch.from_numpy(weight.expected.transpose(0, 2, 1).copy())
        packed |= {key + ending: stored for ending, stored in weight.stored.items()}
    whole, _ = await tokens(save(tmp_path / "dense", tokenizer, config, plain))
    config = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    path = save(tmp_path / "packed", tokenizer, config, packed)
    found, chosen = await tokens(path)
    assert found == whole
    if load_backends()["mlx"].availability().is_available:
        assert chosen == "mlx"
        assert (await tokens(path, "mlx"))[0] == whole


@pytest.mark.parametrize("name", ["awq", "fp8-blocks", "bnb-nf4"])
async def test_experts_in_tensors_of_their_own_are_gathered(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    """Files hold one matrix for each expert; transformers computes with all in one tensor."""
    config, packed, plain = quantized(
        name, "qwen3_moe", 512, tie_word_embeddings=False, **LLAMA, moe_intermediate_size=64,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, head_dim=16,
    )  # fmt: skip
    assert any("experts.3.up_proj" in key for key in plain)
    await assert_same_logits(tmp_path, tokenizer, config, packed, plain)


@pytest.mark.parametrize("name", ["bnb-nf4", "gptq"])
async def test_pickles_of_quantized_weights_compute_the_same(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    config, packed, plain = quantized(name, "llama", 512, tie_word_embeddings=False, **LLAMA)
    await assert_same_logits(tmp_path, tokenizer, config, packed, plain, is_pickle=True)
