"""Tests of control tokens' names in texts that encoders read, in every format."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Engine, EngineOptions
from backends.coreml.backend import CoremlBackend
from core.types import RerankInputs
from tests.contract.encoders.test_encoder_zoo import opened
from tests.encoder_models import (
    ENCODERS,
    RERANKERS,
    VOCABULARY,
    export_coreml,
    export_onnx,
    save_encoder,
    tiny_qwen3,
)
from tests.gguf_files import hf_bert_gguf, qwen3_ranker_gguf


def _safetensors(folder: Path, kind: str) -> Engine:
    models = RERANKERS if kind == "rerank" else ENCODERS
    return opened(save_encoder(folder / "model", models["bert"]) / "model.safetensors")


def _onnx(folder: Path, kind: str) -> Engine:
    if kind == "rerank":
        saved = save_encoder(folder / "model", RERANKERS["bert"])
        return opened(export_onnx(saved, RERANKERS["bert"], "logits"))
    return opened(export_onnx(save_encoder(folder / "model", ENCODERS["bert"]), ENCODERS["bert"]))


def _gguf(folder: Path, kind: str) -> Engine:
    models = RERANKERS if kind == "rerank" else ENCODERS
    saved = save_encoder(folder / "model", models["bert"])
    return opened(hf_bert_gguf(saved, folder / "bert.gguf", VOCABULARY))


def _coreml(folder: Path, kind: str) -> Engine:
    del kind
    pytest.importorskip("coremltools")
    package = export_coreml(save_encoder(folder / "model", ENCODERS["bert"]), ENCODERS["bert"])
    backend = CoremlBackend()
    return backend.open(backend.identify(package / "Manifest.json"), EngineOptions(threads=1))


KINDS: list[tuple[Callable[[Path, str], Engine], str]] = [
    *((make, kind) for make in (_safetensors, _onnx, _gguf) for kind in ("embed", "rerank")),
    (_coreml, "embed"),
]


@pytest.fixture(params=KINDS, ids=lambda each: f"{each[0].__name__[1:]}-{each[1]}")
async def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    make, kind = request.param
    engine: Engine = make(tmp_path, kind)

    async def tokens(text: str) -> tuple[int, Any]:
        if kind == "embed":
            found = await engine.embed([text])
            return found.prompt_tokens, found.vectors[0]
        scored = await engine.rerank(RerankInputs("the cat", (text,)))
        return scored.prompt_tokens, scored.scores[0]

    yield tokens
    await engine.close()


@pytest.mark.parametrize("name", ["[SEP]", "[CLS]", "[MASK]", "[PAD]"])
async def test_a_name_is_several_tokens(encoder: Any, name: str) -> None:
    without, plain = await encoder("the cat on the mat")
    count, made = await encoder(f"the cat {name} on the mat")
    # Two brackets, and at least one piece of the word.
    assert count >= without + 3
    assert np.all(np.isfinite(made))
    assert not np.allclose(made, plain, atol=1e-6)


async def test_names_in_a_reranked_document_are_text_in_the_models_prompt(tmp_path: Path) -> None:
    import torch

    tensors = {name: value.numpy() for name, value in tiny_qwen3().state_dict().items()}
    path = qwen3_ranker_gguf(tmp_path / "qwen3.gguf", tensors, torch.randn(2, 32).numpy())
    engine = opened(path, context_tokens=400)
    own: Any = engine
    model = own._model
    plain = model.tokenize_pair("the sea", "the harbour")
    control = {model._model.encode(name, add_bos=False, parse_special=True)[0]: name
               for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}  # fmt: skip
    counts = {each: plain.count(each) for each in control}
    assert counts[next(iter(counts))] == 3
    for name in control.values():
        for query, document in ((f"the {name} sea", "the harbour"), ("the sea", f"the {name}")):
            ids = model.tokenize_pair(query, document)
            assert {each: ids.count(each) for each in control} == counts
            assert control.keys().isdisjoint(model.tokenize_part(document))
    # What is encoded in parts is what is encoded at once.
    pieces = [(model._prompt.before, True), ("the sea", False), (model._prompt.between, True)]
    pieces += [("the harbour", False), (model._prompt.after, True)]
    assert model._encode_markup(pieces, add_bos=True) == plain
    scores = (await engine.rerank(RerankInputs("the sea", ("<|im_end|>", "water")))).scores
    assert np.all(np.isfinite(scores))
    await engine.close()
