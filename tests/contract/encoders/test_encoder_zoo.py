"""Encoders of many architectures and layouts give the vectors of sentence-transformers."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions
from backends.registry import load_backends
from core.errors import ContextLengthExceeded, RequestError
from core.types import Capability, EmbeddingParams, RerankInputs
from tests.encoder_models import (
    ENCODERS,
    LENGTH,
    PAIRS,
    RERANKERS,
    TEXTS,
    WIDTH,
    add_modules,
    move_transformer,
    pooling,
    save_dense,
    save_encoder,
    to_pickle,
    tokenizer,
    write_json,
)
from tests.requests import rounding

sentence_transformers = pytest.importorskip("sentence_transformers")

LEAST_COSINE = 0.9999
LARGEST_SCORE_CHANGE = rounding(1e-4, metal=2e-3)
NORMALIZE: tuple[str, dict[str, Any]] = ("Normalize", {})


def opened(path: Path, **options: Any) -> Engine:
    """Identify and open the model of a weight file."""
    format = {".safetensors": "safetensors", ".bin": "pytorch", ".onnx": "onnx", ".gguf": "gguf"}
    backend = load_backends()[format[path.suffix]]
    return backend.open(backend.identify(path), EngineOptions(threads=1, **options))


def reference(
    folder: Path, texts: Sequence[str] = TEXTS, **arguments: Any
) -> tuple[NDArray[np.float32], int | None]:
    """Return sentence-transformers' vectors and its limit of input."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        if model.max_seq_length is None or model.max_seq_length > LENGTH:
            # Without a limit, or with that of a table that has rows for padding.
            model.max_seq_length = LENGTH
        vectors = model.encode(list(texts), batch_size=1, show_progress_bar=False, **arguments)
    return np.asarray(vectors, np.float32), model.max_seq_length


def cosines(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    assert one.shape == other.shape
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.asarray(np.einsum("bd,bd->b", first, second) / lengths)


async def check(
    folder: Path, weights: Path | None = None, params: EmbeddingParams | None = None, **wanted: Any
) -> NDArray[np.float32]:
    """Compare the vectors, together and alone, with the reference; return them."""
    expected, limit = reference(folder, **wanted)
    engine = opened(weights or folder / "model.safetensors")
    try:
        assert engine.context_tokens == limit
        assert engine.info.context_length == limit
        params = params or EmbeddingParams()
        found = (await engine.embed(TEXTS, params=params)).vectors
        assert cosines(found, expected).min() >= LEAST_COSINE
        alone = (await engine.embed(TEXTS[:1], params=params)).vectors
        assert cosines(alone, expected[:1]).min() >= LEAST_COSINE
    finally:
        await engine.close()
    return found


@pytest.mark.parametrize("name", ENCODERS)
async def test_an_architecture_gives_the_vectors_of_the_library(name: str, tmp_path: Path) -> None:
    await check(save_encoder(tmp_path / "model", ENCODERS[name]))


@pytest.mark.parametrize(
    ("modes", "is_unit"),
    [
        (("mean_tokens",), False),
        (("cls_token",), True),
        (("max_tokens",), False),
        (("mean_sqrt_len_tokens",), False),
        (("weightedmean_tokens",), True),
        (("lasttoken",), True),
        (("cls_token", "mean_tokens"), True),
        (("max_tokens", "weightedmean_tokens", "lasttoken"), False),
    ],
)
async def test_every_pooling_is_that_of_the_library(
    modes: tuple[str, ...], is_unit: bool, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    add_modules(folder, pooling(*modes), *([NORMALIZE] if is_unit else []))
    found = await check(folder)
    lengths = np.linalg.norm(found, axis=1)
    assert bool(np.allclose(lengths, 1, atol=1e-5)) is is_unit


@pytest.mark.parametrize("is_pickled", [False, True])
async def test_dense_and_norm_modules_are_applied_in_their_order(
    is_pickled: bool, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    dense = save_dense(folder / "2_Dense", WIDTH, 24, is_pickled=is_pickled)
    shrinking = save_dense(folder / "4_Dense", 24, 8, is_pickled=is_pickled, seed=6)
    shrinking[1]["activation_function"] = "torch.nn.modules.linear.Identity"
    norm: tuple[str, dict[str, Any]] = ("LayerNorm", {"dimension": 24})
    add_modules(folder, pooling("mean_tokens"), dense, norm, shrinking)
    import torch

    torch.manual_seed(9)
    save_file(
        {"norm.weight": torch.randn(24), "norm.bias": torch.randn(24)},
        folder / "3_LayerNorm" / "model.safetensors",
    )
    found = await check(folder)
    assert found.shape == (len(TEXTS), 8)


@pytest.mark.parametrize("includes_prompt", [True, False])
@pytest.mark.parametrize("mode", ["mean_tokens", "weightedmean_tokens", "cls_token"])
async def test_prompts_are_put_before_texts(
    includes_prompt: bool, mode: str, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    add_modules(
        folder,
        pooling(mode, include_prompt=includes_prompt),
        NORMALIZE,
        prompts={"query": "query: ", "passage": "the passage: "},
        default_prompt_name="passage",
    )
    await check(folder)
    await check(folder, params=EmbeddingParams(prompt_name="query"), prompt_name="query")
    await check(folder, params=EmbeddingParams(input_type="query"), prompt_name="query")
    await check(folder, params=EmbeddingParams(prompt_name="document"), prompt_name="document")
    engine = opened(folder / "model.safetensors")
    with pytest.raises(RequestError, match="passage, query"):
        await engine.embed(["a"], params=EmbeddingParams(prompt_name="web"))
    await engine.close()


@pytest.mark.parametrize("in_config", [True, False])
async def test_the_stated_limit_cuts_longer_inputs(in_config: bool, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["roberta"])
    if in_config:
        add_modules(folder, pooling("mean_tokens"), NORMALIZE)
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16})
    else:
        tokenizer(model_max_length=16).save_pretrained(folder)
    await check(folder)
    engine = opened(folder / "model.safetensors")
    found = await engine.embed(["cat " * 20])
    assert (found.prompt_tokens, found.truncated_tokens) == (16, 6)
    with pytest.raises(ContextLengthExceeded, match=r"16 tokens.* input\[0\] .*22 tokens"):
        await engine.embed(["cat " * 20], params=EmbeddingParams(truncate="none"))
    await engine.close()


async def test_the_tokenizer_may_cut_at_the_start(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    tokenizer(truncation_side="left").save_pretrained(folder)
    await check(folder)


async def test_texts_are_lowered_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    tokenizer(lowercase=False).save_pretrained(folder)
    add_modules(folder, pooling("mean_tokens"), NORMALIZE)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": LENGTH, "do_lower_case": True}
    )
    await check(folder)


async def test_the_transformer_may_be_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "mine", ENCODERS["bert"])
    add_modules(folder, pooling("cls_token"), NORMALIZE)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 24})
    inner = move_transformer(folder)
    await check(folder, inner / "model.safetensors")
    info = load_backends()["safetensors"].identify(inner / "model.safetensors")
    assert info.name == "mine"
    assert folder / "modules.json" in info.files


@pytest.mark.parametrize("name", ["bert", "qwen3", "t5-encoder"])
async def test_pytorch_files_give_the_same(name: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS[name])
    expected, _ = reference(folder)
    engine = opened(to_pickle(folder))
    assert cosines((await engine.embed(TEXTS)).vectors, expected).min() >= LEAST_COSINE
    await engine.close()


@pytest.mark.parametrize("dimensions", [1, 5, WIDTH])
async def test_dimensions_are_the_first_numbers_with_length_one(
    dimensions: int, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    add_modules(folder, pooling("mean_tokens"), NORMALIZE)
    expected, _ = reference(folder, truncate_dim=dimensions, normalize_embeddings=True)
    engine = opened(folder / "model.safetensors")
    params = EmbeddingParams(dimensions=dimensions)
    found = (await engine.embed(TEXTS, params=params)).vectors
    np.testing.assert_allclose(found, expected, atol=rounding(2e-5, metal=1e-3))
    with pytest.raises(RequestError, match=f"1 to {WIDTH}"):
        await engine.embed(["a"], params=EmbeddingParams(dimensions=WIDTH + 1))
    await engine.close()


async def test_what_the_library_saves_itself_is_read(tmp_path: Path) -> None:
    from sentence_transformers import models

    folder = save_encoder(tmp_path / "model", ENCODERS["bert"])
    modules = [
        models.Transformer(str(folder)),
        models.Pooling(WIDTH, pooling_mode=("mean", "cls")),
        models.Dense(2 * WIDTH, 16),
        models.Normalize(),
    ]
    model = sentence_transformers.SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "query: "}
    )
    model.save_pretrained(str(tmp_path / "saved"))
    await check(tmp_path / "saved")


def expected_scores(folder: Path) -> NDArray[np.float32]:
    """Return the CrossEncoder's scores of `PAIRS`."""
    import torch

    query, documents = PAIRS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sentence_transformers.CrossEncoder(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        model.max_seq_length = min(model.max_seq_length, LENGTH)
        pairs = [(query, document) for document in documents]
        scores = model.predict(pairs, batch_size=1, show_progress_bar=False)
    return np.asarray(scores, np.float32)


async def check_scores(
    weights: Path, expected: NDArray[np.float32], largest_change: float = LARGEST_SCORE_CHANGE
) -> None:
    engine = opened(weights)
    try:
        assert engine.info.capabilities == {Capability.RERANK}
        assert engine.context_tokens == LENGTH
        found = await engine.rerank(RerankInputs(*PAIRS))
        np.testing.assert_allclose(found.scores, expected, atol=largest_change)
        alone = await engine.rerank(RerankInputs(PAIRS[0], PAIRS[1][:1]))
        np.testing.assert_allclose(alone.scores, expected[:1], atol=largest_change)
        assert found.truncated_tokens > 0
        with pytest.raises(ContextLengthExceeded, match=r"documents\[3\]"):
            await engine.rerank(RerankInputs(*PAIRS, is_truncated=False))
    finally:
        await engine.close()


@pytest.mark.parametrize("name", RERANKERS)
async def test_a_cross_encoder_gives_the_scores_of_the_library(name: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS[name])
    await check_scores(folder / "model.safetensors", expected_scores(folder))


async def test_a_decoder_without_padding_scores_one_pair_at_a_time(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["llama"], pad_token_id=None)
    await check_scores(folder / "model.safetensors", expected_scores(folder))


@pytest.mark.parametrize("key", ["sbert_ce_default_activation_function", "sentence_transformers"])
async def test_the_activation_is_the_one_that_the_model_names(key: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["bert"])
    by_default = expected_scores(folder)
    config = json.loads((folder / "config.json").read_text())
    name = "torch.nn.modules.linear.Identity"
    config[key] = {"activation_fn": name} if key == "sentence_transformers" else name
    write_json(folder / "config.json", config)
    expected = expected_scores(folder)
    assert abs(expected - by_default).min() > 0.1
    await check_scores(folder / "model.safetensors", expected)


async def test_a_cross_encoder_as_the_library_saves_it_and_as_pytorch_file(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", RERANKERS["bert"])
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu", local_files_only=True)
    model.save_pretrained(str(tmp_path / "saved"))
    expected = expected_scores(folder)
    await check_scores(tmp_path / "saved" / "model.safetensors", expected)
    await check_scores(to_pickle(folder), expected)
