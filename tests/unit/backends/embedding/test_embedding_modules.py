"""Modules after the pooling, prompts and activations: what is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from backends.embedding.folder import EmbeddingSettings, read_settings
from backends.embedding.head import VectorHead
from backends.embedding.inputs import padded
from backends.embedding.modules import load_module, read_module
from backends.embedding.pooling import Pooling
from backends.embedding.relevance import ScoreActivation, read_activation
from core.errors import BrokenModel, EngineFailed

DENSE: dict[str, Any] = {"in_features": 2, "out_features": 3}
WEIGHT = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
VECTORS = np.array([[1, -2], [0, 0.5]], np.float32)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def dense(folder: Path, weight: np.ndarray = WEIGHT, **config: Any) -> Path:
    """Write a Dense module without bias."""
    write(folder / "config.json", {**DENSE, "bias": False, **config})
    save_file({"linear.weight": np.ascontiguousarray(weight)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch.nn.modules.linear.Identity", [1, -2, -1]),
        ("torch.nn.modules.activation.ReLU", [1, 0, 0]),
        ("torch.nn.modules.activation.Tanh", np.tanh([1, -2, -1])),
        ("torch.nn.modules.activation.Sigmoid", 1 / (1 + np.exp([-1, 2, 1]))),
        ("torch.nn.modules.activation.SiLU", [1, -2, -1] / (1 + np.exp([-1, 2, 1]))),
        ("torch.nn.modules.activation.GELU", [0.8413447, -0.0455003, -0.1586553]),
        ("torch.nn.modules.activation.LeakyReLU", [1, -0.02, -0.01]),
        (None, np.tanh([1, -2, -1])),
    ],
)
def test_every_activation_is_that_of_torch(tmp_path: Path, name: str | None, expected: Any) -> None:
    module = read_module("Dense", dense(tmp_path, activation_function=name))
    found = load_module(module)(VECTORS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def test_a_residual_is_added_after_the_activation(tmp_path: Path) -> None:
    config = {"use_residual": True, "out_features": 2}
    folder = dense(tmp_path, np.eye(2, dtype=np.float32), **config)
    found = load_module(read_module("Dense", folder))(VECTORS)
    np.testing.assert_allclose(found, np.tanh(VECTORS) + VECTORS, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_of_other_types_are_read(tmp_path: Path, kind: Any) -> None:
    found = load_module(read_module("Dense", dense(tmp_path, WEIGHT.astype(kind))))(VECTORS)
    np.testing.assert_allclose(found, np.tanh(VECTORS @ WEIGHT.T), rtol=1e-3)


def test_bfloat16_weights_are_read(tmp_path: Path) -> None:
    import struct

    write(tmp_path / "config.json", {**DENSE, "bias": False})
    entry = {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 12]}
    header = json.dumps({"linear.weight": entry}).encode()
    words = (WEIGHT.view(np.uint32) >> 16).astype("<u2").tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + words)
    found = load_module(read_module("Dense", tmp_path))(VECTORS)
    np.testing.assert_allclose(found, np.tanh(VECTORS @ WEIGHT.T), rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"in_features": 2**31},
        {"in_features": 0},
        {"in_features": True},
        {"in_features": "2"},
        {"out_features": None},
        {"out_features": -3},
        {"activation_function": "os.system"},
        {"activation_function": "torch.hub.load"},
        {"activation_function": ["torch.nn.Tanh"]},
        {"module_input_name": "token_embeddings"},
        {"module_output_name": "scores"},
    ],
)
def test_a_module_that_cannot_be_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(BrokenModel):
        read_module("Dense", dense(tmp_path, **config))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = dense(tmp_path / "shape", WEIGHT.T)
    with pytest.raises(BrokenModel, match=r"\(2, 3\).*expected \(3, 2\)"):
        load_module(read_module("Dense", folder))
    folder = dense(tmp_path / "bias", bias=True)
    with pytest.raises(BrokenModel, match=r"linear\.bias is missing"):
        load_module(read_module("Dense", folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenModel, match="missing"):
        load_module(read_module("Dense", folder))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BrokenModel, match=r"model\.safetensors"):
        load_module(read_module("Dense", folder))


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 64, b"\x02" + bytes(7) + b"{}" + b"[]"])
def test_damaged_weights_are_refused(tmp_path: Path, data: bytes) -> None:
    folder = dense(tmp_path)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(BrokenModel):
        load_module(read_module("Dense", folder))


def test_vectors_of_another_width_than_the_modules_are_refused(tmp_path: Path) -> None:
    module = read_module("Dense", dense(tmp_path))
    head = VectorHead(EmbeddingSettings(Pooling("mean", normalize=False), (module,)))
    assert head.pool(np.ones((1, 2, 2), np.float32), padded([[1, 2]])).shape == (1, 3)
    with pytest.raises(BrokenModel, match="8 numbers"):
        head.pool(np.ones((1, 2, 8), np.float32), padded([[1, 2]]))


def write_model(folder: Path, *kinds: str, **config: Any) -> Path:
    listing = [
        {"path": f"{index}_{kind}" if index else "", "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", listing)
    write(folder / "config_sentence_transformers.json", config)
    return folder


@pytest.mark.parametrize(
    "kinds",
    [
        (),
        ("Pooling",),
        ("Transformer",),
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Pooling", "Pooling"),
        ("Transformer", "Pooling", "CLIPModel"),
    ],
)
def test_modules_in_another_order_are_refused(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    folder = write_model(tmp_path, *kinds)
    dense(folder / "1_Dense")
    with pytest.raises(BrokenModel):
        read_settings(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"prompts": ["query: "]},
        {"prompts": {"query": 7}},
        {"prompts": {"query": "x" * 20_000}},
        {"default_prompt_name": "web"},
        {"default_prompt_name": 3},
        {"model_kwargs": {"x": 1}},
    ],
)
def test_damaged_prompts_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(BrokenModel):
        read_settings(write_model(tmp_path, "Transformer", "Pooling", **config))


def test_prompts_may_be_null(tmp_path: Path) -> None:
    config = {"prompts": {"query": None}, "default_prompt_name": "document"}
    settings = read_settings(write_model(tmp_path, "Transformer", "Pooling", **config))
    assert (settings.prompts.by_name, settings.prompts.default_name) == ({"query": ""}, "document")


@pytest.mark.parametrize(
    ("own", "config", "name"),
    [
        ({}, {}, "Sigmoid"),
        ({"activation_fn": "torch.nn.modules.linear.Identity"}, {}, "Identity"),
        (
            {},
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "Identity",
        ),
        ({}, {"sbert_ce_default_activation_function": "torch.nn.Tanh"}, "Tanh"),
    ],
)
def test_the_activation_of_scores_is_found(
    tmp_path: Path, own: dict[str, Any], config: dict[str, Any], name: str
) -> None:
    write(tmp_path / "config_sentence_transformers.json", own)
    assert read_activation(tmp_path, config) == ScoreActivation(name)


def test_an_activation_outside_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="evil"):
        read_activation(tmp_path, {"sbert_ce_default_activation_function": "evil.Code"})


def test_logits_of_several_labels_are_no_score() -> None:
    assert ScoreActivation("Identity").scores(np.ones(3)).shape == (3, 1)
    with pytest.raises(EngineFailed, match="4 labels"):
        ScoreActivation().scores(np.ones((2, 4)))
