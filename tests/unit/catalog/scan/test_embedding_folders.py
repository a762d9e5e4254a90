"""Embedding and reranking models with several folders and files are one entry each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.onnx_files import write_tokenizer
from tests.unit.catalog.scan.folders import Shelf, write_json, write_weights

BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "vocab_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
WEIGHTS = {"embeddings.word_embeddings.weight": np.zeros((64, 8), np.float32)}


def write_encoder(folder: Path, **config: Any) -> Path:
    """Write an encoder's folder; its weights are never loaded here."""
    write_json(folder / "config.json", {**BERT, **config})
    write_weights(folder / "model.safetensors", WEIGHTS)
    write_tokenizer(folder)
    return folder


def write_modules(folder: Path, transformer: str, dense_file: str) -> None:
    """Write a model with a Dense module, whose weights are in `dense_file`."""
    kinds = {transformer: "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    listing = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    write_json(folder / "modules.json", listing)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    write_json(folder / "2_Dense" / "config.json", {"in_features": 8, "out_features": 4})
    tensors = {
        "linear.weight": np.zeros((4, 8), np.float32),
        "linear.bias": np.zeros(4, np.float32),
    }
    path = folder / "2_Dense" / dense_file
    if path.suffix == ".bin":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    else:
        write_weights(path, tensors)


@pytest.mark.parametrize("dense_file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_a_model_with_modules_is_one_entry(shelf: Shelf, transformer: str, dense_file: str) -> None:
    folder = shelf.models / "mine"
    write_encoder(folder / transformer)
    write_modules(folder, transformer, dense_file)
    shelf.scan()
    assert shelf.states() == {"mine@safetensors-f32": "ok"}
    assert shelf.scan().added == ()
    assert shelf.looked == []


def test_a_module_that_is_not_supported_is_refused_at_the_scan(shelf: Shelf) -> None:
    folder = write_encoder(shelf.models / "mine")
    write_modules(folder, "", "model.safetensors")
    shelf.scan()
    assert shelf.states() == {"mine@safetensors-f32": "ok"}
    kind = "sentence_transformers.models.LSTM"
    write_json(folder / "modules.json", [{"path": "", "type": kind}])
    shelf.scan(later_s=3600)
    (state,) = shelf.states().values()
    assert state != "ok"


def test_a_classifier_is_refused_once_and_a_reranker_is_served(shelf: Shelf) -> None:
    heads = ["BertForSequenceClassification"]
    write_encoder(shelf.models / "sentiment", architectures=heads, num_labels=3)
    write_encoder(shelf.models / "ranker", architectures=heads, num_labels=1)
    shelf.scan()
    states = shelf.states()
    assert states.pop("ranker@safetensors-f32") == "ok"
    ((name, state),) = states.items()
    assert name.startswith("sentiment")
    assert state != "ok"
