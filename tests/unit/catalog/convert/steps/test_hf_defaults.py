"""Defaults that programs do not share are written into the configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from catalog.convert.steps.hf_defaults import complete_config

pytest.importorskip("transformers")


def completed(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    made = complete_config(folder)
    assert json.loads((folder / "config.json").read_text()) == made
    return made


def test_what_a_configuration_leaves_out_is_filled_in(tmp_path: Path) -> None:
    made = completed(tmp_path, {"model_type": "llama", "hidden_size": 64, "custom": [1]})
    assert made["tie_word_embeddings"] is False
    assert made["rope_theta"] == 10_000.0
    assert (made["hidden_size"], made["custom"]) == (64, [1])
    # Tokens are named elsewhere; a class's default would end answers at another one.
    assert not {"eos_token_id", "bos_token_id", "dtype", "transformers_version"} & made.keys()
    assert completed(tmp_path, {"model_type": "qwen3"})["head_dim"] == 128


def test_what_a_configuration_says_is_kept(tmp_path: Path) -> None:
    said = {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 7.0, "hidden_size": 8}
    made = completed(tmp_path, said)
    assert made.items() >= said.items()
    assert "rope_parameters" not in made


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "never-heard-of", "hidden_size": 8},
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
        {"model_type": "llama", "num_hidden_layers": "many"},
        {},
    ],
)
def test_other_configurations_stay_as_they_are(tmp_path: Path, config: dict[str, Any]) -> None:
    assert completed(tmp_path, config) == config
