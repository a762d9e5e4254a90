"""Other architectures and vocabularies than the starter's, as tiny models with random weights."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions
from backends.engine.row_model import RowInput
from backends.gguf.backend import GgufBackend
from backends.gguf.trial import ContextRows
from backends.limits import Watched
from core.errors import (
    BrokenModel,
    ContextLengthExceeded,
    EngineFailed,
    QueueFull,
    RequestError,
    UnsupportedCapability,
)
from core.types import EmbeddingParams
from tests.gguf_files import (
    bert_gguf,
    gemma2_gguf,
    llama_gguf,
    mamba_gguf,
    minilm_gguf,
    qwen2_gguf,
)
from tests.requests import chat, end_of, request, run, text_of, token_ids_of

Writer = Callable[[Path], Path]


def without_template(path: Path) -> Path:
    return llama_gguf(path, chat_template=None)


WRITERS: dict[str, Writer] = {
    "llama-sentencepiece": llama_gguf,
    "llama-no-template": without_template,
    "qwen2-large-vocabulary": qwen2_gguf,
    "gemma2-sliding-window": gemma2_gguf,
    "mamba-recurrent": mamba_gguf,
}
OPTIONS = EngineOptions(max_sequences=4, threads=1, context_tokens=512, prefill_chunk_tokens=64)
WORDS = "the sea and the harbour and the ships on the water "


def open_model(path: Path, options: EngineOptions = OPTIONS) -> Engine:
    backend = GgufBackend()
    return backend.open(backend.identify(path), options)


@pytest.mark.parametrize("kind", WRITERS)
async def test_kind_batches_shares_prefixes_and_cancels(kind: str, tmp_path: Path) -> None:
    engine = open_model(WRITERS[kind](tmp_path / f"{kind}.gguf"))
    prompts = [request(WORDS * 4 + f"number {index}", max_tokens=16) for index in range(4)]
    alone = [token_ids_of(await run(engine, prompt)) for prompt in prompts]
    assert all(alone)
    stream = engine.generate(request(WORDS * 20, max_tokens=100))
    await anext(stream)
    await stream.aclose()
    together = await asyncio.gather(*(run(engine, prompt) for prompt in prompts))
    assert [token_ids_of(events) for events in together] == alone
    await engine.close()


@pytest.mark.parametrize("kind", WRITERS)
async def test_kind_passes_the_trial_and_leaves_the_context_empty(
    kind: str, tmp_path: Path
) -> None:
    engine = open_model(WRITERS[kind](tmp_path / f"{kind}.gguf"))
    assert engine.limitations == ()
    assert engine.max_sequences == OPTIONS.max_sequences
    assert engine.load().kv_used_tokens == 0
    first = await run(engine, request(WORDS, max_tokens=1))
    assert end_of(first).usage.cached_tokens == 0
    await engine.close()


@pytest.mark.parametrize(
    ("fault", "limitation"),
    [("copy_row", "does not reuse computed prompts"), ("extend", "one after the other")],
)
async def test_what_is_wrong_in_a_context_is_not_done(
    fault: str, limitation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(ContextRows, fault)

    def copy_row(rows: ContextRows, source: int, length: int, capacity: int) -> int | None:
        # The last token is missing, but counts.
        copied: int | None = original(rows, source, length - 1, capacity)
        if copied is not None:
            rows._lengths[copied] = length
        return copied

    def extend(rows: ContextRows, inputs: Sequence[RowInput]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = original(rows, inputs)
        return logits if len(inputs) == 1 else -logits

    monkeypatch.setattr(ContextRows, fault, {"copy_row": copy_row, "extend": extend}[fault])
    path = llama_gguf(tmp_path / "llama.gguf")
    engine = open_model(path)
    assert [limitation in text for text in engine.limitations] == [True]
    assert engine.max_sequences == (1 if fault == "extend" else OPTIONS.max_sequences)
    later = request(WORDS * 4, max_tokens=4)
    alone = token_ids_of(await run(engine, later))
    again = await asyncio.gather(
        *(run(engine, replace(later, id=f"later-{number}")) for number in range(3))
    )
    assert [token_ids_of(each) for each in again] == [alone] * 3
    if fault == "copy_row":
        # Part of another prompt is not reused; the same sequence going on is.
        other = await run(engine, request(WORDS * 3 + "number 5", max_tokens=1))
        assert end_of(other).usage.cached_tokens == 0
    await engine.close()


async def test_a_model_that_cannot_be_computed_is_refused_and_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EngineFailed("llama_decode returned -3: no kernel")

    monkeypatch.setattr(ContextRows, "compute", fail)
    with pytest.raises(BrokenModel, match="no kernel"):
        open_model(llama_gguf(tmp_path / "llama.gguf"))


@pytest.mark.parametrize("kind", WRITERS)
async def test_kind_continues_a_conversation_from_its_prefix(kind: str, tmp_path: Path) -> None:
    engine = open_model(WRITERS[kind](tmp_path / f"{kind}.gguf"))
    beginning = (WORDS * 3).strip()
    first = await run(engine, request(beginning, max_tokens=1))
    later = request(beginning + " and then", max_tokens=12)
    events = await run(engine, later)
    assert end_of(events).usage.cached_tokens >= end_of(first).usage.prompt_tokens - 2
    cold = open_model(WRITERS[kind](tmp_path / "again.gguf"))
    assert token_ids_of(await run(cold, later)) == token_ids_of(events)
    await engine.close()
    await cold.close()


@pytest.mark.parametrize("kind", WRITERS)
async def test_kind_continues_an_answer_with_the_next_numbers_of_its_seed(
    kind: str, tmp_path: Path
) -> None:
    engine = open_model(WRITERS[kind](tmp_path / f"{kind}.gguf"))
    for seed in range(3):
        wanted = request(WORDS * 4, max_tokens=16, temperature=1.0, seed=seed)
        whole = token_ids_of(await run(engine, wanted))
        begun = replace(wanted, generated=tuple(whole[:9]))
        assert token_ids_of(await run(engine, begun)) == whole[9:]
    await engine.close()


@pytest.mark.parametrize("kind", WRITERS)
async def test_kind_answers_a_chat(kind: str, tmp_path: Path) -> None:
    engine = open_model(WRITERS[kind](tmp_path / f"{kind}.gguf"))
    events = await run(engine, request(chat("hello"), max_tokens=8))
    assert 1 <= end_of(events).usage.completion_tokens <= 8
    text_of(events).encode()
    await engine.close()


async def test_real_embeddings_are_near_for_near_words(tmp_path: Path) -> None:
    engine = open_model(minilm_gguf(tmp_path / "minilm.gguf"))
    texts = ["cat", "kitten", "the stock market fell", "a longer text, " * 20, "cat"]
    embeddings = await engine.embed(texts)
    vectors = embeddings.vectors
    assert vectors.shape == (5, 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert 0.75 < float(vectors[0] @ vectors[1]) < 0.82
    assert float(vectors[0] @ vectors[2]) < 0.2
    assert np.allclose(vectors[0], vectors[4], atol=1e-3)
    alone = await engine.embed(["kitten"])
    assert np.allclose(alone.vectors[0], vectors[1], atol=1e-3)
    assert embeddings.prompt_tokens > 80
    await engine.close()


async def test_embedding_many_inputs_keeps_their_order(tmp_path: Path) -> None:
    engine = open_model(bert_gguf(tmp_path / "bert.gguf"))
    texts = [f"text {index} " + "the sea " * (index % 7) for index in range(100)]
    batch = (await engine.embed(texts)).vectors
    for index in (0, 31, 32, 99):
        alone = (await engine.embed([texts[index]])).vectors[0]
        assert np.allclose(batch[index], alone, atol=1e-3)
    await engine.close()


async def test_embedding_refuses_more_than_may_wait(tmp_path: Path) -> None:
    options = replace(OPTIONS, max_waiting=1)
    backend = GgufBackend()
    engine = backend.open(backend.identify(bert_gguf(tmp_path / "bert.gguf")), options)
    first, second = (asyncio.ensure_future(engine.embed(["the sea"] * 200)) for _ in range(2))
    while engine.load().waiting < 1:
        await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await engine.embed(["hello"])
    assert caught.value.retry_after_s
    assert isinstance(engine, Watched)
    await asyncio.gather(first, second)
    assert engine.stalled_s == 0.0
    assert len((await engine.embed(["hello"])).vectors) == 1
    await engine.close()


async def test_embedding_that_is_cancelled_computes_no_further_batches(tmp_path: Path) -> None:
    engine = open_model(bert_gguf(tmp_path / "bert.gguf"))
    task = asyncio.ensure_future(engine.embed(["the sea"] * 5000))
    while engine.load().steps < 1:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len((await engine.embed(["hello"])).vectors) == 1
    assert engine.load().steps < 5000 // 32
    await engine.close()


async def test_embedding_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    engine = open_model(bert_gguf(tmp_path / "bert.gguf"))
    with pytest.raises(ContextLengthExceeded):
        await engine.embed(["sea " * 5000], params=EmbeddingParams(truncate="none"))
    assert (await engine.embed(["sea " * 5000])).prompt_tokens == engine.context_tokens
    with pytest.raises(RequestError, match="vocabulary"):
        await engine.embed([[10**6]])
    with pytest.raises(RequestError, match="empty"):
        await engine.embed([[]])
    with pytest.raises(UnsupportedCapability):
        await run(engine, request("hello"))
    await engine.close()
    await engine.close()
