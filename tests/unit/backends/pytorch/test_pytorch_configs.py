"""Configurations that make no sense are refused with words when PyTorch loads the model."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends.hf.folder import read_folder
from backends.pytorch.file import pytorch_info
from backends.pytorch.loading import load_model
from core.errors import BrokenModel

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rms_norm_eps", "x", "rms_norm_eps.*expected float"),
        ("hidden_act", 5, "hidden_act.*expected str"),
        ("hidden_act", "nonesuch", "nonesuch"),
        ("rope_scaling", [1], "rope_parameters"),
        ("rope_theta", "x", "transformers cannot"),
        ("attention_bias", "maybe", "attention_bias"),
        ("head_dim", 0, "transformers cannot"),
        ("num_attention_heads", 0, "transformers cannot"),
        ("num_key_value_heads", 0, "transformers cannot"),
        ("pad_token_id", 10**9, "transformers cannot"),
        ("layer_types", ["x"], "layer_type"),
        ("torch_dtype", "nonesuch", "nonesuch"),
        ("id2label", {"a": "b"}, "transformers cannot"),
        ("fusion_config", {"a": 1}, "transformers cannot"),
        ("transformers_weights", "/etc/passwd", "transformers cannot"),
        ("base_model_tp_plan", 7, "transformers cannot"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_with_words(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model.embed_tokens.weight": torch.zeros(32, 8)}, path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    info = pytorch_info(path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(BrokenModel, match=reason):
        load_model(info, read_folder(tmp_path))
