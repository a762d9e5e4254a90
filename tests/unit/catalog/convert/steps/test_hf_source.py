"""What a folder's files say of tokens, templates and settings stands in the GGUF file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.gguf.header import GgufFile, read_gguf
from catalog.convert.job import Job, link_source, write_json
from catalog.convert.steps.hf_source import read_source
from catalog.convert.steps.to_gguf import _write
from core.errors import BrokenModel, UnsupportedCapability
from tests.tiny_folders import END, SIDECARS, TURN_END, write_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("transformers")
Change = Callable[[Path, dict[str, Any]], None]


def written(tmp_path: Path, change: Change = lambda _folder, _config: None) -> GgufFile:
    """Write a folder's tokenizer and settings as GGUF, and read the file's header."""
    folder, work = tmp_path / "source", tmp_path / "work"
    work.mkdir()
    size = write_tokenizer(folder)
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": size,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    }  # fmt: skip
    change(folder, config)
    write_json(folder / "config.json", config)
    files = tuple(sorted(path for path in folder.glob("*.json")))
    job = Job("safetensors", "gguf", files, work / "out", work, "tiny", "f32")
    path = work / "made.gguf"
    _write(job, read_source(link_source(job), folder), path, "f32", None, lambda *_: None)
    return read_gguf(path)


def test_everything_is_carried_over(tmp_path: Path) -> None:
    header = written(tmp_path)
    ids = {token["content"]: token["id"] for token in json.loads(
        (tmp_path / "source" / "tokenizer.json").read_text())["added_tokens"]}  # fmt: skip
    assert header.metadata["tokenizer.ggml.eos_token_id"] == ids[TURN_END]
    # llama.cpp knows it by its name, so that it needs no place.
    assert END in ids
    assert "tokenizer.ggml.eot_token_id" not in header.metadata
    assert header.text("tokenizer.chat_template") == SIDECARS["chat_template.jinja"]
    named = SIDECARS["additional_chat_templates/tool_use.jinja"]
    assert header.text("tokenizer.chat_template.tool_use") == named
    assert header.text("general.license") == "mit"
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert header.text("llama.rope.scaling.type") == "linear"
    assert header.metadata["llama.rope.scaling.factor"] == 4.0
    assert header.metadata["llama.rope.freq_base"] == 5e5
    # Left to transformers by the configuration: as many as there are query heads.
    assert header.metadata["llama.attention.head_count_kv"] == 4


def test_recommended_sampling_is_written(tmp_path: Path) -> None:
    metadata = written(tmp_path).metadata
    found = {key: value for key, value in metadata.items() if key.startswith("general.sampling.")}
    assert found == {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}


def test_sampling_that_is_switched_off_is_not_recommended(tmp_path: Path) -> None:
    def change(folder: Path, _config: dict[str, Any]) -> None:
        write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.1})

    keys = written(tmp_path, change).metadata.keys()
    assert not [key for key in keys if key.startswith("general.sampling.")]


def test_unnamed_end_tokens_get_places_of_their_own(tmp_path: Path) -> None:
    def change(folder: Path, _config: dict[str, Any]) -> None:
        write_json(folder / "generation_config.json", {"eos_token_id": [5, 6]})

    header = written(tmp_path, change)
    assert header.metadata["tokenizer.ggml.eot_token_id"] == 5
    assert header.metadata["tokenizer.ggml.eom_token_id"] == 6


def test_more_end_tokens_than_places_are_refused(tmp_path: Path) -> None:
    def change(folder: Path, _config: dict[str, Any]) -> None:
        write_json(folder / "generation_config.json", {"eos_token_id": [5, 6, 7]})

    with pytest.raises(UnsupportedCapability, match="4 different tokens"):
        written(tmp_path, change)


def test_templates_in_the_tokenizers_configuration_are_found(tmp_path: Path) -> None:
    def change(folder: Path, _config: dict[str, Any]) -> None:
        (folder / "chat_template.jinja").unlink()
        listed = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
        write_json(folder / "tokenizer_config.json", {"chat_template": listed})

    header = written(tmp_path, change)
    assert header.text("tokenizer.chat_template") == "D"
    assert header.text("tokenizer.chat_template.rag") == "R"


def test_the_context_ends_at_a_sliding_window(tmp_path: Path) -> None:
    def change(_folder: Path, config: dict[str, Any]) -> None:
        config |= {"model_type": "mistral", "sliding_window": 48}

    assert written(tmp_path, change).metadata["llama.context_length"] == 48


@pytest.mark.parametrize("size", [10, 2**23])
def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    def change(_folder: Path, config: dict[str, Any]) -> None:
        config["vocab_size"] = size

    with pytest.raises(BrokenModel, match="vocab_size"):
        written(tmp_path, change)
