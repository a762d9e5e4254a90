"""Encoders in ONNX, Core ML and GGUF give the vectors and scores of PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import EngineOptions
from backends.coreml.backend import CoremlBackend
from backends.gguf.rank_prompt import rank_prompt
from backends.registry import load_backends
from core.errors import BrokenModel
from core.types import EmbeddingParams, RerankInputs
from tests.contract.encoders.test_encoder_zoo import (
    LEAST_COSINE,
    NORMALIZE,
    check_scores,
    cosines,
    expected_scores,
    opened,
    reference,
)
from tests.encoder_models import (
    ENCODERS,
    LENGTH,
    PAIRS,
    RERANKERS,
    TEXTS,
    VOCABULARY,
    WIDTH,
    add_modules,
    export_coreml,
    export_onnx,
    pooling,
    save_dense,
    save_encoder,
    tiny_qwen3,
    tokenizer,
)
from tests.gguf_files import hf_bert_gguf, qwen3_ranker_gguf
from tests.requests import rounding


async def test_an_onnx_encoder_gives_the_vectors_of_pytorch(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    dense = save_dense(folder / "2_Dense", 2 * WIDTH, 8)
    add_modules(
        folder,
        pooling("mean_tokens", "cls_token"),
        dense,
        NORMALIZE,
        prompts={"query": "query: "},
        default_prompt_name="query",
    )
    expected, limit = reference(folder)
    engine = opened(export_onnx(folder, ENCODERS["bert"]))
    assert engine.context_tokens == engine.info.context_length == limit
    assert cosines((await engine.embed(TEXTS)).vectors, expected).min() >= LEAST_COSINE
    await engine.close()


async def test_an_onnx_cross_encoder_gives_the_scores_of_pytorch(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["bert"])
    expected = expected_scores(folder)
    await check_scores(export_onnx(folder, RERANKERS["bert"], "logits"), expected)


async def test_an_onnx_classifier_and_half_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["bert"], num_labels=3)
    path = export_onnx(folder, RERANKERS["bert"], "logits")
    with pytest.raises(BrokenModel, match="classifier with 3 labels"):
        load_backends()["onnx"].identify(path)
    folder = save_encoder(tmp_path / "half", ENCODERS["bert"])
    path = export_onnx(folder, ENCODERS["bert"])
    half = path.rename(path.with_name("encoder_model.onnx"))
    with pytest.raises(BrokenModel, match="half of an encoder-decoder"):
        load_backends()["onnx"].identify(half)


async def test_a_core_ml_encoder_gives_the_vectors_of_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    add_modules(folder, pooling("mean_tokens", "cls_token"), NORMALIZE)
    expected, limit = reference(folder)
    backend = CoremlBackend()
    package = export_coreml(folder, ENCODERS["bert"])
    info = backend.identify(package / "Manifest.json")
    engine = backend.open(info, EngineOptions(threads=1))
    assert engine.context_tokens == info.context_length == limit
    found = await engine.embed(TEXTS)
    assert cosines(found.vectors, expected).min() >= LEAST_COSINE
    assert found.truncated_tokens > 0
    await engine.close()


async def test_a_gguf_encoder_gives_the_vectors_of_pytorch(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    expected, _ = reference(folder)
    engine = opened(hf_bert_gguf(folder, tmp_path / "bert.gguf", VOCABULARY))
    assert engine.context_tokens == LENGTH
    found = await engine.embed(TEXTS)
    assert cosines(found.vectors, expected).min() >= LEAST_COSINE
    assert found.truncated_tokens > 0
    short = await engine.embed(TEXTS, params=EmbeddingParams(dimensions=5))
    np.testing.assert_allclose(np.linalg.norm(short.vectors, axis=1), 1, atol=1e-5)
    await engine.close()


@pytest.mark.parametrize("types", [1, 2])
async def test_a_gguf_cross_encoder_gives_the_scores_of_pytorch(types: int, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["bert"])
    if types == 1:
        # A model that knows one segment only, as RoBERTa does.
        tokenizer(model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    expected = expected_scores(folder)
    path = hf_bert_gguf(folder, tmp_path / "bert.gguf", VOCABULARY, has_one_type=types == 1)
    # llama.cpp looks GELU up in a table of float16 numbers.
    await check_scores(path, expected, 5e-4)


async def test_many_gguf_pairs_are_scored_alike(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["bert"])
    engine = opened(hf_bert_gguf(folder, tmp_path / "bert.gguf", VOCABULARY))
    documents = tuple(f"{PAIRS[1][0]} {'mat ' * index}" for index in range(40))
    together = await engine.rerank(RerankInputs(PAIRS[0], documents))
    for index in (0, 7, 39):
        alone = await engine.rerank(RerankInputs(PAIRS[0], documents[index : index + 1]))
        np.testing.assert_allclose(
            alone.scores[0], together.scores[index], atol=rounding(1e-4, metal=1e-3)
        )
    await engine.close()


@pytest.mark.parametrize("template", ["", "Q {query} D {document}:"])
async def test_a_gguf_language_model_is_asked_with_its_own_prompt(
    template: str, tmp_path: Path
) -> None:
    import torch

    model = tiny_qwen3()
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    head = torch.randn(2, 32)
    engine = opened(
        qwen3_ranker_gguf(tmp_path / "qwen3.gguf", tensors, head.numpy(), template),
        context_tokens=256,
    )
    query, documents = "what word?", ("the water", "", "hello world. " * 100)
    found = await engine.rerank(RerankInputs(query, documents))
    own: Any = engine
    prompt = rank_prompt(template)
    for score, document in zip(found.scores[:2], documents[:2], strict=True):
        text = prompt.render(query, document)
        assert prompt.before in text
        ids = own._model._model.encode(text, add_bos=True, parse_special=True)
        with torch.no_grad():
            last = model(torch.tensor([ids])).last_hidden_state[0, -1]
            wanted = torch.softmax(head @ last, 0)[0]
        assert score == pytest.approx(float(wanted), abs=2e-3)
    assert found.truncated_tokens > 0
    await engine.close()


def test_a_prompt_without_both_texts_is_refused() -> None:
    for template in ("{query}", "Is {document} about {query}?", "yes or no"):
        with pytest.raises(BrokenModel, match="document"):
            rank_prompt(template)
