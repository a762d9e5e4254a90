"""One model in every format through the API: only the model's name changes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import InternalServerError, OpenAI

from tests.gguf_files import minilm_gguf
from tests.golden import golden
from tests.integration.server import Server

NAME = "golden-135m"
# Format and quantization of each golden model as the server shows it.
VARIANTS = {
    "mlx-4bit": "mlx-4bit",
    "hf-f32": "safetensors-f32",
    "pytorch": "pytorch-f32",
    "onnx-f32": "onnx-f32",
    "coreml": "coreml-f32",
    "gguf-f32": "gguf-f32",
}
FULL_PRECISION = [name for name in VARIANTS.values() if name.endswith("f32")]
QUESTION: Any = [{"role": "user", "content": "What is gravity?"}]


def place(kind: str, folder: Path) -> Path:
    """Copy a golden model into `folder`, under the one name."""
    target = folder / VARIANTS[kind] / NAME
    source = golden(kind)
    if source.is_file():
        target.mkdir(parents=True)
        shutil.copy(source, target / f"{NAME}.gguf")
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("provenance.json"))
    return target


@pytest.fixture(scope="module")
def models(server: Server) -> Iterator[dict[str, dict[str, Any]]]:
    """Put every variant where the server scans; return the entries of /v1/models by id."""
    for kind in VARIANTS:
        place(kind, server.models)
    minilm_gguf(server.models / "minilm-F32.gguf")
    wanted = [*(f"{NAME}@{name}" for name in VARIANTS.values()), "minilm@gguf-f32"]
    yield server.wait_for_models(*wanted)
    for name in VARIANTS.values():
        shutil.rmtree(server.models / name)
    (server.models / "minilm-F32.gguf").unlink()


def stream(client: OpenAI, model: str) -> tuple[str, int]:
    """Return the streamed text and the number of tokens in its usage."""
    chunks = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        timeout=240,
    )
    text, tokens = "", 0
    for chunk in chunks:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return text, tokens


def test_every_format_is_listed_with_its_runtime(models: dict[str, dict[str, Any]]) -> None:
    runtimes = {name: models[f"{NAME}@{name}"]["runtime"] for name in VARIANTS.values()}
    assert runtimes["gguf-f32"] == "llama.cpp"
    assert runtimes["mlx-4bit"] == "mlx"
    assert runtimes["safetensors-f32"] == "mlx"
    assert models[f"{NAME}@safetensors-f32"]["runtime_reason"]
    assert runtimes["pytorch-f32"] == "pytorch"
    assert runtimes["onnx-f32"] == "onnxruntime"
    assert runtimes["coreml-f32"] in ("reference", "coreml")
    for name in VARIANTS.values():
        entry = models[f"{NAME}@{name}"]
        assert (entry["state"], entry["reason"]) == ("available", "")
        assert entry["max_model_len"] > 0
        assert "chat" in entry["capabilities"]


def test_the_same_weights_answer_alike_in_every_format(
    client: OpenAI, models: dict[str, dict[str, Any]]
) -> None:
    answers = {name: stream(client, f"{NAME}@{name}") for name in FULL_PRECISION}
    assert len(set(answers.values())) == 1, answers
    assert answers["gguf-f32"][1] == 16
    assert len(models) > len(answers)


def test_a_quantized_variant_answers_too(client: OpenAI, models: dict[str, dict[str, Any]]) -> None:
    assert f"{NAME}@mlx-4bit" in models
    text, tokens = stream(client, f"{NAME}@mlx-4bit")
    assert text
    assert 0 < tokens <= 16


@pytest.mark.parametrize(
    "model", ["all-minilm-l6-v2@onnx-int8", "all-minilm-l6-v2@safetensors-f32", "minilm@gguf-f32"]
)
def test_embeddings_of_every_format(
    client: OpenAI, models: dict[str, dict[str, Any]], model: str
) -> None:
    assert models[model]["capabilities"] == ["embedding"]
    answer = client.embeddings.create(model=model, input=["a cat", "a kitten", "car"], timeout=120)
    vectors = np.array([entry.embedding for entry in answer.data])
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0] * 3, abs=1e-4)
    assert answer.usage.prompt_tokens > 6
    if "minilm-l6" in model:
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_a_format_that_is_not_for_this_system_says_so(client: OpenAI, server: Server) -> None:
    listed = httpx.get(f"{server.url}/api/models", timeout=60).json()["models"]
    (apple,) = (entry for entry in listed if entry["format"] == "apple-foundation")
    if apple["state"] == "available":
        pytest.skip("Apple's model can run here")
    assert "macOS 26" in apple["reason"]
    with pytest.raises(InternalServerError) as caught:
        client.chat.completions.create(model=apple["id"], messages=QUESTION)
    assert caught.value.status_code == 503
    assert caught.value.code == "backend_unavailable"
    assert "macOS 26" in caught.value.message
