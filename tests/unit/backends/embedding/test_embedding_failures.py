"""An embedding request fails alone, and hangs nothing: its inputs, its tokens, its vectors."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from backends.embedding.engine import EmbeddingEngine
from backends.embedding.pooling import unit
from core.errors import ContextLengthExceeded, EngineFailed, NonFiniteOutput, RequestFailed
from core.types import EmbeddingParams, Embeddings
from tests.unit.backends.embedding.test_embedding_engine import Encoder, held_task, open_engine
from tests.unit.backends.engine.faulty import Panic, until

BAD = "bb"


class FaultyEncoder(Encoder):
    """Fails for one text, and for whatever is computed or tokenized with it."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: BaseException | float | None = None
        self.tokenizing: BaseException | None = None
        self.tokenized: list[str] = []
        self.slow = ""
        self.may_tokenize = threading.Event()
        self.may_tokenize.set()

    def tokenize(self, text: str, prompt: str = "") -> list[int]:
        if not self.slow or text == self.slow:
            self.may_tokenize.wait()
        self.tokenized.append(text)
        if self.tokenizing is not None and text == BAD:
            raise self.tokenizing
        return super().tokenize(text, prompt)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        vectors = super().encode(token_lists)
        if self.problem is None or [1, *BAD.encode(), 2] not in [list(ids) for ids in token_lists]:
            return vectors
        if isinstance(self.problem, BaseException):
            raise self.problem
        return np.full_like(vectors, self.problem)


@pytest.fixture
def encoder() -> FaultyEncoder:
    return FaultyEncoder()


@pytest_asyncio.fixture
async def engine(encoder: FaultyEncoder) -> AsyncIterator[EmbeddingEngine]:
    engine = open_engine(encoder)
    yield engine
    encoder.free.set()
    encoder.may_tokenize.set()
    await engine.close()


async def together(engine: EmbeddingEngine, encoder: FaultyEncoder, *texts: str) -> list[Any]:
    """Return the results of requests that are computed in one batch."""
    first = await held_task(engine, encoder, ["z"])
    tasks = [asyncio.ensure_future(engine.embed([text])) for text in texts]
    await until(lambda: len(engine._submitted) + sum(t.done() for t in tasks) == len(texts))
    encoder.free.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("problem", "error"),
    [
        (ValueError("the row is broken"), RequestFailed),
        (MemoryError(), RequestFailed),
        (Panic("panicked"), RequestFailed),
        (EngineFailed("llama_decode failed"), EngineFailed),
        (float("nan"), NonFiniteOutput),
        (float("inf"), NonFiniteOutput),
    ],
)
async def test_an_input_that_spoils_its_batch_fails_its_own_request(
    engine: EmbeddingEngine,
    encoder: FaultyEncoder,
    problem: BaseException | float,
    error: type[Exception],
) -> None:
    encoder.problem = problem
    before, bad, after = await together(engine, encoder, "aa", BAD, "cc")
    assert type(bad) is error
    for result, text in ((before, "aa"), (after, "cc")):
        assert isinstance(result, Embeddings)
        assert result.vectors.tolist() == [[2 * ord(text[0]) + 3, 4]]
    assert not engine.is_failed


@pytest.mark.parametrize("problem", [ValueError("no token"), Panic("no token"), RecursionError()])
async def test_a_text_that_cannot_be_tokenized_fails_its_own_request(
    engine: EmbeddingEngine, encoder: FaultyEncoder, problem: BaseException
) -> None:
    encoder.tokenizing = problem
    before, bad, after = await together(engine, encoder, "aa", BAD, "cc")
    assert type(bad) is RequestFailed
    assert (bad.status, bad.code) == (500, "request_failed")
    assert isinstance(before, Embeddings)
    assert isinstance(after, Embeddings)


async def test_a_request_for_which_no_thread_starts_fails(
    engine: EmbeddingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(EngineFailed, match="No thread could be started"):
            await asyncio.wait_for(engine.embed(["a"]), 30)
    assert len((await engine.embed(["a"])).vectors) == 1


async def test_a_text_that_is_tokenized_slowly_delays_no_other_request(
    engine: EmbeddingEngine, encoder: FaultyEncoder
) -> None:
    encoder.slow = "slow"
    encoder.may_tokenize.clear()
    slow = [asyncio.ensure_future(engine.embed(["slow"])) for _ in range(3)]
    await until(lambda: engine.load().waiting == 2)
    for text in ("a", "b", "c"):
        assert len((await engine.embed([text])).vectors) == 1
    assert not any(task.done() for task in slow)
    encoder.may_tokenize.set()
    await asyncio.gather(*slow)


async def test_closing_waits_for_tokenizing_and_resolves_its_requests(
    encoder: FaultyEncoder,
) -> None:
    engine = open_engine(encoder)
    encoder.may_tokenize.clear()
    tasks = [asyncio.ensure_future(engine.embed([text])) for text in ("a", "b")]
    await until(lambda: engine.stalled_s > 0)
    closing = asyncio.ensure_future(engine.close())
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineFailed] * 2
    assert not closing.done()
    encoder.may_tokenize.set()
    await closing
    assert encoder.closed == 1
    assert encoder.batches == []


async def test_a_client_that_leaves_has_no_more_inputs_tokenized(
    engine: EmbeddingEngine, encoder: FaultyEncoder
) -> None:
    encoder.may_tokenize.clear()
    many = asyncio.ensure_future(engine.embed([f"m{index}" for index in range(500)]))
    await until(lambda: engine.stalled_s > 0)
    many.cancel()
    await asyncio.gather(many, return_exceptions=True)
    encoder.may_tokenize.set()
    await engine.embed(["a"])
    assert sorted(encoder.tokenized) == ["a", "m0"]


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    class Bounding(FaultyEncoder):
        def fewest_tokens(self, text: str, limit: int) -> int:
            return 0 if len(text) <= limit else limit + 5

    encoder = Bounding()
    engine = open_engine(encoder)
    with pytest.raises(ContextLengthExceeded, match="at least 17 tokens"):
        await engine.embed(["a" * 13], params=EmbeddingParams(truncate="none"))
    assert encoder.tokenized == []
    await engine.embed(["a" * 10])
    await engine.close()


async def test_tokenizing_that_hangs_is_told(
    engine: EmbeddingEngine, encoder: FaultyEncoder
) -> None:
    encoder.may_tokenize.clear()
    hung = asyncio.ensure_future(engine.embed(["a"]))
    await until(lambda: engine.stalled_s > 0)
    encoder.may_tokenize.set()
    await hung
    await until(lambda: engine.stalled_s == 0)


async def test_when_the_thread_ends_every_request_is_resolved(
    engine: EmbeddingEngine, encoder: FaultyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("gone")

    first = await held_task(engine, encoder, ["z"])
    tasks = [asyncio.ensure_future(engine.embed([text])) for text in ("a", "b")]
    await until(lambda: len(engine._submitted) == 2)
    monkeypatch.setattr("backends.embedding.engine.next_batch", fail)
    encoder.free.set()
    await first
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineFailed] * 2
    assert engine.is_failed
    with pytest.raises(EngineFailed, match="gone"):
        await engine.embed(["c"])
    await until(lambda: encoder.closed == 1)


async def test_a_model_that_cannot_be_closed_ends_all_the_same(encoder: FaultyEncoder) -> None:
    def fail() -> None:
        raise Panic("no close")

    encoder.close = fail  # type: ignore[method-assign]
    engine = open_engine(encoder)
    await engine.embed(["a"])
    await engine.close()
    assert engine.stalled_s == 0.0


def test_large_vectors_get_unit_length_and_infinite_ones_are_no_numbers() -> None:
    large = np.array([[3e30, 4e30], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(unit(large), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert np.isnan(unit(np.array([[np.inf, 1.0]], np.float32))).any()
    assert np.isnan(unit(np.array([[np.nan, 1.0]], np.float32))).all()
