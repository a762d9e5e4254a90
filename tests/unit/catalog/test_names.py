"""Tests of readable, stable and unique model names."""

import re
import unicodedata
from pathlib import PurePosixPath

import pytest

from catalog.names import bare_name, model_id, nearest_names, slug, tag_name, unique_id

CACHE = "/h/models--org--Tiny-LM/snapshots/" + "c0" * 20


@pytest.mark.parametrize(
    ("path", "title", "name"),
    [
        ("/m/SmolLM2-135M-Instruct.Q4_1.gguf", "Smollm2 Mix", "smollm2-135m-instruct"),
        ("/m/qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "", "qwen2.5-7b-instruct"),
        ("/m/Qwen3-4B-UD-Q4_K_XL.gguf", "", "qwen3-4b"),
        ("/m/gemma-3-1b-it.i1-IQ3_XXS.gguf", "", "gemma-3-1b-it"),
        ("/m/gpt-oss-20b-mxfp4.gguf", "", "gpt-oss-20b"),
        ("/m/Llama-3.2-1B-f16.gguf", "", "llama-3.2-1b"),
        ("/m/qwen2.5-7b", "", "qwen2.5-7b"),
        ("/m/phi-2.gguf", "", "phi-2"),
        ("/m/model.gguf", "Nice Model 3B", "nice-model-3b"),
        ("/m/Phi-4-GGUF/ggml-model-q4_0.gguf", "", "phi-4"),
        ("/m/Phi-4-GGUF/Q4_K_M.gguf", "", "phi-4"),
        ("/h/models--org--Tiny-LM/snapshots/" + "a" * 40 + "/model.gguf", "", "tiny-lm"),
        ("/o/blobs/sha256-" + "0f" * 32, "Llama 3", "llama-3"),
        ("/h/mlx-community/Qwen3-0.6B-4bit/model.safetensors", "", "qwen3-0.6b"),
        (
            "/h/models--onnx-community--Qwen3-0.6B-ONNX/snapshots/"
            + "a" * 40
            + "/onnx/model_q4f16.onnx",
            "",
            "qwen3-0.6b",
        ),
        ("/m/Mistral7B-Int4.mlpackage/Manifest.json", "", "mistral7b"),
        ("/m/mlx-4bit/smollm2-135m/model.safetensors", "", "smollm2-135m"),
        # A Hugging Face cache: the repository names the model, whatever its files are called.
        (f"{CACHE}/model.safetensors", "", "tiny-lm"),
        (f"{CACHE}/pytorch_model-00001-of-00002.bin", "", "tiny-lm"),
        (f"{CACHE}/consolidated.00.pth", "", "tiny-lm"),
        (f"{CACHE}/Fancy-Weights.safetensors", "", "tiny-lm"),
        (f"{CACHE}/model.safetensors", "some title", "tiny-lm"),
        (f"{CACHE}/onnx/model_qint8_avx512_vnni.onnx", "", "tiny-lm"),
        (f"{CACHE}/1.5b/model.safetensors", "", "tiny-lm-1.5b"),
        (f"{CACHE}/Tiny-LM-chat.Q4_0.gguf", "", "tiny-lm-chat"),
        (f"{CACHE}/ggml-model-q4_0.gguf", "Made By Someone", "tiny-lm"),
        ("/h/models--gpt2/snapshots/" + "a" * 40 + "/model.safetensors", "", "gpt2"),
        # Training output: the run names the model.
        ("/m/my-run/checkpoint-500/model.safetensors", "checkpoint-500", "my-run-checkpoint-500"),
        ("/models/checkpoint-500/model.safetensors", "checkpoint-500", "checkpoint-500"),
        # Variants of exporters.
        ("/m/All-MiniLM/onnx/model_O3.onnx", "", "all-minilm"),
        ("/m/All-MiniLM/onnx/model_qint8_arm64.onnx", "", "all-minilm"),
        ("/m/gpt2/onnx/decoder_model_merged_int8.onnx", "", "gpt2"),
        ("/m/gpt2/onnx/decoder_with_past_model.onnx", "", "gpt2"),
        ("/m/tiny/adapter_model.safetensors", "", "tiny"),
        ("/m/phi-2/phi-2.gguf", "", "phi-2"),
        ("/模型.gguf", "", "model"),
        ("/m/Café.gguf", "", "cafe"),
        ("/m/-rf.gguf", "", "rf"),
        ("/m/CON.gguf", "", "con"),
        ("/m/🦙 tiny\n\x00.gguf", "", "tiny"),
    ],
)
def test_bare_name_of_a_path(path: str, title: str, name: str) -> None:
    assert bare_name(PurePosixPath(path).parts, title) == name


def test_bare_name_is_the_same_for_both_unicode_forms() -> None:
    names = {
        bare_name([unicodedata.normalize(form, "Übung-é.gguf")], "") for form in ("NFC", "NFD")
    }
    assert names == {"ubung-e"}


def test_bare_name_of_a_very_long_file_is_short() -> None:
    assert len(bare_name(["x" * 250 + ".gguf"], "")) == 96


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("llama3.2:1b", "llama3.2-1b"),
        ("Llama3:latest", "llama3"),
        ("llama3:", "llama3"),
        ("qwen2.5:7b-instruct-q4_K_M", "qwen2.5-7b-instruct"),
        ("plain", "plain"),
    ],
)
def test_an_ollama_tag_is_the_name_that_its_model_has_here(name: str, bare: str) -> None:
    assert tag_name(name) == bare


@pytest.mark.parametrize("text", ["a/../b", "a\u202eb", "a;DROP TABLE x", "\ud800x", "A B", "％"])
def test_slug_has_plain_characters_only(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9._-]*", slug(text))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("smollm2", "gguf", "q4_1"), "smollm2@gguf-q4_1"),
        (("echo", "echo", ""), "echo@echo"),
    ],
)
def test_model_id_of_its_parts(parts: tuple[str, str, str], expected: str) -> None:
    assert model_id(*parts) == expected


def test_unique_id_counts_from_two() -> None:
    assert unique_id("a@gguf", {"b@gguf"}) == "a@gguf"
    assert unique_id("a@gguf", {"a@gguf", "a@gguf-2"}) == "a@gguf-3"


def test_nearest_names_are_at_most_three_and_best_first() -> None:
    known = [f"smollm{n}-135m@gguf-q4_1" for n in range(2, 7)] + ["unrelated@echo"]
    nearest = nearest_names("SMOLLM3-135m", known)
    assert len(nearest) == 3
    assert nearest[0] == "smollm3-135m@gguf-q4_1"


@pytest.mark.parametrize("name", ["", "zzzz", "x" * 1_000_000, "\ud83d"])
def test_nearest_names_of_nonsense_are_none(name: str) -> None:
    assert nearest_names(name, ["smollm2@gguf-q4_1"]) == []
