"""Embedding models with quantized weights, or as a trainer left them, give the same vectors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from backends.base import EngineOptions
from backends.registry import load_backends
from tests.onnx_files import VOCABULARY, write_tokenizer
from tests.quantized import METHODS

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 160, "max_position_embeddings": 64,
}  # fmt: skip


def encoder() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and random weights of a BERT."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
    config = {**model.config.to_dict(), "architectures": ["BertModel"]}
    return config, {name: value.clone() for name, value in model.state_dict().items()}


async def vectors(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    """Return the vectors of three texts."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    save_file({name: value.contiguous() for name, value in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    backend = load_backends()["safetensors"]
    info = backend.identify(folder / "model.safetensors")
    engine = backend.open(info, EngineOptions(threads=1))
    found = await engine.embed(["t1 t2 t3", "t4", "t5 t6 t7 t8"])
    await engine.close()
    return np.array(found.vectors)


@pytest.mark.parametrize("name", ["awq", "fp8-blocks", "bnb-nf4"])
async def test_quantized_embedders_give_the_vectors_of_their_weights(
    tmp_path: Path, name: str
) -> None:
    settings, make, _ = METHODS[name]
    config, plain = encoder()
    generator, packed = np.random.default_rng(6), {}
    for key, value in list(plain.items()):
        if value.ndim < 2 or "embeddings" in key:
            packed[key] = value
            continue
        weight = make(generator, (value.shape[0], value.shape[1]))
        plain[key] = torch.from_numpy(weight.expected.copy())
        base = key.removesuffix("weight")
        packed |= {base + ending: stored for ending, stored in weight.stored.items()}
    expected = await vectors(tmp_path / "dense", config, plain)
    config = {**config, "quantization_config": settings}
    found = await vectors(tmp_path / "packed", config, packed)
    np.testing.assert_allclose(found, expected, atol=1e-5)


async def test_an_embedder_with_wrapped_names_gives_the_same_vectors(tmp_path: Path) -> None:
    config, plain = encoder()
    expected = await vectors(tmp_path / "plain", config, plain)
    wrapped = {f"module.{name}": value for name, value in plain.items()}
    found = await vectors(tmp_path / "wrapped", config, wrapped)
    np.testing.assert_array_equal(found, expected)
