"""Tests of the engine that embedding models share."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from backends.base import ModelInfo
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.limits import UNLIMITED, EngineLimits, Watched
from core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InsufficientMemory,
    NonFiniteOutput,
    QueueFull,
    RequestError,
    RequestFailed,
    TimedOut,
    Unavailable,
    UnsupportedCapability,
)
from core.types import Capability, EmbeddingParams, Embeddings
from tests.requests import request, run

INFO = ModelInfo(
    format="safetensors",
    name="mini",
    architecture="bert",
    quantization="f32",
    files=(Path("/m/model.safetensors"),),
    size_bytes=1,
    parameters=1,
    context_length=12,
    capabilities=frozenset({Capability.EMBEDDING}),
)


class Encoder:
    """Gives each list (its sum, its length); remembers batches, and waits while it is held."""

    vocabulary_size = 256
    special_tokens = ((1,), (2,))

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.started = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.closed = 0
        self.answer: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda v: v

    def tokenize(self, text: str, prompt: str = "") -> list[int]:
        """Return the bytes, with 1 before and 2 after."""
        return [1, *(prompt + text).encode(), 2]

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors."""
        self.batches.append([list(ids) for ids in token_lists])
        self.started.set()
        self.free.wait()
        return self.answer(np.array([(sum(ids), len(ids)) for ids in token_lists], np.float32))

    def close(self) -> None:
        """Count the calls."""
        self.closed += 1

    async def until_started(self) -> None:
        """Wait until a batch is being computed."""
        await asyncio.get_running_loop().run_in_executor(None, self.started.wait)


def open_engine(encoder: Encoder, max_waiting: int = 256) -> EmbeddingEngine:
    return EmbeddingEngine(
        INFO,
        lambda: encoder,
        context_tokens=12,
        batch_limits=BatchLimits(24),
        max_waiting=max_waiting,
    )


@pytest.fixture
def encoder() -> Encoder:
    """An encoder that is not held."""
    return Encoder()


@pytest_asyncio.fixture
async def engine(encoder: Encoder) -> AsyncIterator[EmbeddingEngine]:
    """An engine over it."""
    engine = open_engine(encoder)
    yield engine
    encoder.free.set()
    await engine.close()


def expected(encoder: Encoder, texts: Sequence[str]) -> list[list[float]]:
    lists = [encoder.tokenize(text) for text in texts]
    return [[sum(ids), len(ids)] for ids in lists]


async def test_a_batch_that_does_not_return_is_told(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    assert isinstance(engine, Watched)
    assert engine.stalled_s == 0.0
    held = await held_task(engine, encoder, ["a"])
    while not engine.stalled_s:
        await asyncio.sleep(0.001)
    encoder.free.set()
    await held
    while engine.stalled_s:
        await asyncio.sleep(0.001)


async def test_a_request_ends_at_its_deadline_and_computes_no_further_batch(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    held = await held_task(engine, encoder, ["a"])
    with pytest.raises(TimedOut) as caught:
        await engine.embed(["b", "c", "d", "e", "f", "g", "h", "i", "j"], deadline_s=0.01)
    assert (caught.value.status, caught.value.code) == (504, "timed_out")
    encoder.free.set()
    await held
    await engine.embed(["k"])
    assert encoder.batches == [[encoder.tokenize("a")], [encoder.tokenize("k")]]


async def held_task(
    engine: EmbeddingEngine, encoder: Encoder, texts: list[str]
) -> "asyncio.Task[Embeddings]":
    """Start a request and hold its first batch."""
    encoder.free.clear()
    task = asyncio.ensure_future(engine.embed(texts))
    await encoder.until_started()
    return task


async def test_vectors_come_in_the_order_of_the_inputs(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    texts = ["ccc", "a", "dddddddd", "bb", "a"]
    embeddings = await engine.embed(texts)
    assert embeddings.vectors.dtype == np.float32
    assert embeddings.vectors.tolist() == expected(encoder, texts)
    assert embeddings.prompt_tokens == sum(len(text) + 2 for text in texts)


async def test_batches_are_alike_in_length_and_within_the_limit(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    await engine.embed(["aaaaaaaaaa", "b", "cc", "dddddddddd", "e", "ff"])
    lengths = [[len(ids) for ids in batch] for batch in encoder.batches]
    assert lengths == [[12, 12], [3, 3, 4, 4]]


async def test_input_longer_than_a_batch_goes_alone(encoder: Encoder) -> None:
    engine = EmbeddingEngine(INFO, lambda: encoder, context_tokens=12, batch_limits=BatchLimits(8))
    await engine.embed(["a" * 10, "b"])
    await engine.close()
    assert [len(batch) for batch in encoder.batches] == [1, 1]


async def test_model_is_opened_computed_and_closed_on_one_thread(encoder: Encoder) -> None:
    threads: list[int] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run_and_note(*args: Any) -> Any:
            threads.append(threading.get_ident())
            return call(*args)

        return run_and_note

    for name in ("encode", "close"):
        setattr(encoder, name, watched(getattr(encoder, name)))
    engine = EmbeddingEngine(
        INFO, watched(lambda: encoder), context_tokens=12, batch_limits=BatchLimits(24)
    )
    await engine.embed(["a"])
    await engine.close()
    assert len(threads) == 3
    assert set(threads) != {threading.get_ident()}
    assert len(set(threads)) == 1


def test_model_that_cannot_be_opened_raises_its_error() -> None:
    def open_model() -> Encoder:
        raise InsufficientMemory("too large", param="model")

    with pytest.raises(InsufficientMemory, match="too large"):
        EmbeddingEngine(INFO, open_model, context_tokens=12, batch_limits=BatchLimits(24))


async def test_requests_share_a_batch(engine: EmbeddingEngine, encoder: Encoder) -> None:
    first = await held_task(engine, encoder, ["a"])
    others = [asyncio.ensure_future(engine.embed([text])) for text in ("bb", "cc", "dd")]
    while len(engine._submitted) < 3:
        await asyncio.sleep(0)
    encoder.free.set()
    results = await asyncio.gather(first, *others)
    assert [len(batch) for batch in encoder.batches] == [1, 3]
    assert [r.vectors.tolist()[0] for r in results] == expected(encoder, ["a", "bb", "cc", "dd"])


async def test_long_request_delays_a_short_one_by_one_batch(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    long = await held_task(engine, encoder, ["a" * 10] * 20)
    short = asyncio.ensure_future(engine.embed(["b"]))
    while len(engine._submitted) < 1:
        await asyncio.sleep(0)
    encoder.free.set()
    await asyncio.gather(long, short)
    places = [i for i, batch in enumerate(encoder.batches) if encoder.tokenize("b") in batch]
    assert places == [2]
    assert engine.load().steps == len(encoder.batches) == 11


async def test_batch_requests_open_their_batches_after_interactive_ones(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    held = await held_task(engine, encoder, ["x"])
    batch = asyncio.ensure_future(engine.embed(["a" * 10] * 4, "batch"))
    while len(engine._submitted) < 1:
        await asyncio.sleep(0)
    quick = asyncio.ensure_future(engine.embed(["b" * 10] * 4))
    while len(engine._submitted) < 2:
        await asyncio.sleep(0)
    encoder.free.set()
    await asyncio.gather(held, batch, quick)
    firsts = [batch[0] for batch in encoder.batches[1:]]
    assert firsts == [encoder.tokenize(text) for text in ("b" * 10, "b" * 10, "a" * 10, "a" * 10)]


async def test_nothing_new_is_embedded_while_nothing_is_admitted(engine: EmbeddingEngine) -> None:
    engine.set_limits(EngineLimits(max_sequences=0))
    with pytest.raises(Unavailable, match="no new requests"):
        await engine.embed(["a"])
    engine.set_limits(UNLIMITED)
    assert len((await engine.embed(["a"])).vectors) == 1


async def test_token_ids_are_taken_as_they_are(engine: EmbeddingEngine) -> None:
    embeddings = await engine.embed([[5, 6, 7], "a"])
    assert embeddings.vectors[0].tolist() == [18, 3]
    assert embeddings.prompt_tokens == 6


@pytest.mark.parametrize("token_id", [-1, 256])
async def test_token_ids_outside_the_vocabulary_are_refused(
    engine: EmbeddingEngine, token_id: int
) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        await engine.embed([[1, token_id]])


@pytest.mark.parametrize("empty", ["", []])
async def test_empty_input_is_refused(engine: EmbeddingEngine, empty: str | list[int]) -> None:
    with pytest.raises(RequestError, match="empty"):
        await engine.embed(["a", empty])


async def test_input_over_the_context_is_refused_with_both_numbers(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    whole = EmbeddingParams(truncate="none")
    with pytest.raises(ContextLengthExceeded, match=r"12 tokens.* input\[1\] .* 13 tokens"):
        await engine.embed(["ok", "a" * 11], params=whole)
    assert encoder.batches == []
    assert (await engine.embed(["a" * 10], params=whole)).prompt_tokens == 12


async def test_one_request_that_is_refused_leaves_the_others_alone(
    engine: EmbeddingEngine,
) -> None:
    results = await asyncio.gather(
        engine.embed(["a"]), engine.embed([""]), engine.embed(["b"]), return_exceptions=True
    )
    assert [type(result) for result in results] == [Embeddings, RequestError, Embeddings]


async def test_vector_that_is_not_finite_fails_its_own_request(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    first = await held_task(engine, encoder, ["z"])
    encoder.answer = lambda v: np.where(v[:, :1] == 2 * 98 + 3, np.nan, v)
    others = [asyncio.ensure_future(engine.embed([text])) for text in ("bb", "cc")]
    while len(engine._submitted) < 2:
        await asyncio.sleep(0)
    encoder.free.set()
    _, bad, good = await asyncio.gather(first, *others, return_exceptions=True)
    assert [len(batch) for batch in encoder.batches] == [1, 2, 1]
    assert isinstance(bad, NonFiniteOutput)
    assert (bad.status, bad.code) == (500, "non_finite_output")
    assert isinstance(good, Embeddings)


async def test_vectors_of_another_shape_fail_the_request(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    encoder.answer = lambda v: v[:-1]
    with pytest.raises(EngineFailed, match="shape"):
        await engine.embed(["a", "b"])


async def test_engine_goes_on_after_a_batch_that_failed(
    engine: EmbeddingEngine, encoder: Encoder
) -> None:
    def fail(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ValueError(f"cannot do {len(vectors)}")

    encoder.answer = fail
    with pytest.raises(RequestFailed, match="cannot do 1"):
        await engine.embed(["a"])
    encoder.answer = lambda v: v
    assert (await engine.embed(["a"])).vectors.tolist() == expected(encoder, ["a"])
    assert engine.load().running == 0


async def test_tokenizer_that_fails_fails_its_request(encoder: Encoder) -> None:
    def tokenize(text: str, prompt: str = "") -> list[int]:
        del prompt
        raise ValueError(text)

    encoder.tokenize = tokenize  # type: ignore[method-assign]
    engine = open_engine(encoder)
    with pytest.raises(RequestFailed, match="tokenization"):
        await engine.embed(["a"])
    assert (await engine.embed([[3]])).prompt_tokens == 1
    await engine.close()


async def test_cancelled_request_is_dropped(engine: EmbeddingEngine, encoder: Encoder) -> None:
    task = await held_task(engine, encoder, ["a" * 10] * 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    encoder.free.set()
    await engine.embed(["b"])
    assert len(encoder.batches) == 2
    assert engine.load().running == 0


@pytest.mark.parametrize(("finished", "retry_after_s"), [(0, 3), (20, 1)])
async def test_queue_that_is_full_refuses_for_as_long_as_others_took(
    encoder: Encoder, finished: int, retry_after_s: int
) -> None:
    engine = open_engine(encoder, max_waiting=1)
    for _ in range(finished):
        await engine.embed(["quick"])
    encoder.started.clear()
    tasks = [await held_task(engine, encoder, ["a"]), asyncio.ensure_future(engine.embed(["b"]))]
    while len(engine._submitted) < 1:
        await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await engine.embed(["c"])
    assert caught.value.retry_after_s == retry_after_s
    encoder.free.set()
    await asyncio.gather(*tasks)
    await engine.close()


async def test_close_fails_what_waits_and_frees_once(encoder: Encoder) -> None:
    engine = open_engine(encoder)
    task = await held_task(engine, encoder, ["a" * 10] * 20)
    closing = asyncio.ensure_future(engine.close())
    await asyncio.sleep(0)
    encoder.free.set()
    await closing
    with pytest.raises(EngineFailed, match="unloaded"):
        await task
    with pytest.raises(EngineFailed, match="unloaded"):
        await engine.embed(["a"])
    await engine.close()
    assert encoder.closed == 1


async def test_no_inputs_give_no_vectors(engine: EmbeddingEngine) -> None:
    embeddings = await engine.embed([])
    assert len(embeddings.vectors) == embeddings.prompt_tokens == 0


async def test_text_is_not_generated(engine: EmbeddingEngine) -> None:
    with pytest.raises(UnsupportedCapability):
        await run(engine, request("hello"))
