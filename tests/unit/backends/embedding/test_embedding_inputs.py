"""What becomes of an input: its prompt, its cut, the pair it is half of, its vector's size."""

from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from backends.base import ModelInfo
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.inputs import InputTokens, PairTemplate, cut_tokens, padded, pair_lengths
from backends.embedding.prompts import Prompts
from core.errors import BrokenModel, ContextLengthExceeded, RequestError, UnsupportedCapability
from core.types import Capability, EmbeddingParams, RerankInputs, Truncation
from tests.unit.backends.embedding.test_embedding_engine import INFO, Encoder

PROMPTS = Prompts({"Query": "q:", "passage": "p:", "long": "pppppp:"}, "passage")
TEMPLATE = PairTemplate((1,), (2, 2), (3,), second_type=1, after_types=(1,))


class PairEncoder(Encoder):
    """Scores a pair by its length and remembers the segments."""

    pair_template = TEMPLATE

    def __init__(self) -> None:
        super().__init__()
        self.types: list[list[int]] = []

    def tokenize_part(self, text: str) -> list[int]:
        return list(text.encode())

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.types += [list(ids.types) for ids in token_lists if isinstance(ids, InputTokens)]
        self.batches.append([list(ids) for ids in token_lists])
        return np.array([[len(ids)] for ids in token_lists], np.float32)


def open_with(encoder: Encoder, prompts: Prompts = PROMPTS, **options: object) -> EmbeddingEngine:
    capability = Capability.RERANK if isinstance(encoder, PairEncoder) else Capability.EMBEDDING
    info: ModelInfo = ModelInfo(
        **{
            **{name: getattr(INFO, name) for name in INFO.__slots__},
            "capabilities": frozenset({capability}),
        }
    )
    return EmbeddingEngine(
        info,
        lambda: encoder,
        context_tokens=12,
        batch_limits=BatchLimits(24),
        prompts=prompts,
        **options,  # type: ignore[arg-type]
    )


@pytest_asyncio.fixture
async def encoder() -> Encoder:
    return Encoder()


@pytest_asyncio.fixture
async def engine(encoder: Encoder) -> AsyncIterator[EmbeddingEngine]:
    engine = open_with(encoder, is_unit=False)
    yield engine
    await engine.close()


@pytest_asyncio.fixture
async def ranker() -> AsyncIterator[tuple[EmbeddingEngine, PairEncoder]]:
    encoder = PairEncoder()
    engine = open_with(encoder)
    yield engine, encoder
    await engine.close()


@pytest.mark.parametrize(
    ("params", "prompt"),
    [
        (EmbeddingParams(), "p:"),
        (EmbeddingParams(prompt_name="Query"), "q:"),
        (EmbeddingParams(prompt_name="query"), ""),
        (EmbeddingParams(prompt_name="document"), ""),
        (EmbeddingParams(input_type="query"), "q:"),
        (EmbeddingParams(input_type="search_query"), "q:"),
        (EmbeddingParams(input_type="document"), "p:"),
        (EmbeddingParams(input_type="passage"), "p:"),
        (EmbeddingParams(input_type="LONG"), "pppppp:"),
        (EmbeddingParams(input_type="classification"), ""),
    ],
)
async def test_a_prompt_is_chosen_by_name_and_by_kind(
    engine: EmbeddingEngine, encoder: Encoder, params: EmbeddingParams, prompt: str
) -> None:
    await engine.embed(["a"], params=params)
    assert encoder.batches == [[encoder.tokenize(prompt + "a")]]


async def test_a_prompt_that_the_model_does_not_have_names_those_it_has(
    engine: EmbeddingEngine,
) -> None:
    with pytest.raises(RequestError, match="Query, document, long, passage, query") as caught:
        await engine.embed(["a"], params=EmbeddingParams(prompt_name="other"))
    assert caught.value.param == "prompt_name"


async def test_token_ids_get_no_prompt(engine: EmbeddingEngine, encoder: Encoder) -> None:
    await engine.embed([[7, 8]])
    assert encoder.batches == [[[7, 8]]]


@pytest.mark.parametrize(
    ("truncate", "kept"),
    [("default", "abcdefghij"), ("end", "abcdefghij"), ("start", "efghijklmn")],
)
async def test_a_long_input_is_cut_between_its_special_tokens(
    encoder: Encoder, truncate: Truncation, kept: str
) -> None:
    engine = open_with(encoder, Prompts())
    found = await engine.embed(["abcdefghijklmn", "x"], params=EmbeddingParams(truncate=truncate))
    assert [1, *kept.encode(), 2] in encoder.batches[0]
    assert (found.prompt_tokens, found.truncated_tokens) == (15, 4)
    await engine.close()


async def test_the_tokenizer_says_which_end_is_cut(encoder: Encoder) -> None:
    engine = open_with(encoder, Prompts(), truncates="start")
    await engine.embed(["abcdefghijklmn"])
    assert encoder.batches == [[[1, *b"efghijklmn", 2]]]
    await engine.close()


async def test_a_prompt_that_is_not_pooled_is_marked() -> None:
    seen: list[int] = []

    class Noting(Encoder):
        def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
            seen.extend(padded(token_lists).pooled[0].tolist())
            return super().encode(token_lists)

    engine = open_with(Noting(), Prompts({"query": "q:"}, "query", is_pooled=False))
    await engine.embed(["ab"])
    # The first special token, and two of the prompt.
    assert seen == [0, 0, 0, 1, 1, 1]
    await engine.close()


@pytest.mark.parametrize(("is_unit", "expected"), [(True, 1.0), (False, 100.0)])
async def test_dimensions_shorten_vectors(encoder: Encoder, is_unit: bool, expected: float) -> None:
    engine = open_with(encoder, Prompts(), is_unit=is_unit)
    found = await engine.embed(["a"], params=EmbeddingParams(dimensions=1))
    assert found.vectors.tolist() == [[expected]]
    with pytest.raises(RequestError, match="1 to 2") as caught:
        await engine.embed(["a"], params=EmbeddingParams(dimensions=3))
    assert caught.value.param == "dimensions"
    await engine.close()


async def test_pairs_are_scored_in_order(ranker: tuple[EmbeddingEngine, PairEncoder]) -> None:
    engine, encoder = ranker
    found = await engine.rerank(RerankInputs("q", ("aaa", "", "bb")))
    assert found.scores.tolist() == [8, 5, 7]
    assert (found.prompt_tokens, found.truncated_tokens) == (20, 0)
    assert [1, *b"q", 2, 2, *b"aaa", 3] in encoder.batches[0]
    assert [0, 0, 0, 0, 1, 1, 1, 1] in encoder.types


async def test_a_long_document_is_cut_or_refused_with_the_counts(
    ranker: tuple[EmbeddingEngine, PairEncoder],
) -> None:
    engine, encoder = ranker
    found = await engine.rerank(RerankInputs("qq", ("a" * 20,)))
    assert encoder.batches == [[[1, *b"qq", 2, 2, *b"aaaaaa", 3]]]
    assert (found.prompt_tokens, found.truncated_tokens) == (12, 14)
    with pytest.raises(ContextLengthExceeded, match=r"12 tokens.* documents\[1\] .*26 tokens"):
        await engine.rerank(RerankInputs("qq", ("a", "a" * 20), is_truncated=False))
    found = await engine.rerank(
        RerankInputs("qq", ("a" * 20,), is_truncated=False, max_document_tokens=3)
    )
    assert (found.prompt_tokens, found.truncated_tokens) == (9, 17)


async def test_a_query_that_fills_the_context_is_named(
    ranker: tuple[EmbeddingEngine, PairEncoder],
) -> None:
    engine, _ = ranker
    with pytest.raises(ContextLengthExceeded) as caught:
        await engine.rerank(RerankInputs("q" * 8, ("a",), is_truncated=False))
    assert caught.value.param == "query"


async def test_a_model_does_only_what_it_is_for(
    engine: EmbeddingEngine, ranker: tuple[EmbeddingEngine, PairEncoder]
) -> None:
    with pytest.raises(UnsupportedCapability, match="rerank"):
        await engine.rerank(RerankInputs("q", ("a",)))
    with pytest.raises(UnsupportedCapability, match="embed"):
        await ranker[0].embed(["a"])


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ((3, 4), 7, (3, 4)),
        ((3, 9), 8, (3, 5)),
        ((9, 3), 8, (5, 3)),
        ((9, 9), 8, (4, 4)),
        ((9, 8), 7, (4, 3)),
        ((20, 6), 5, (3, 2)),
        ((5, 5), 0, (0, 0)),
    ],
)
def test_the_longer_text_of_a_pair_is_cut_first(
    lengths: tuple[int, int], room: int, kept: tuple[int, int]
) -> None:
    assert pair_lengths(*lengths, room) == kept


def test_pairs_are_cut_as_the_tokenizers_library_cuts_them() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for limit in (1, 2, 5, 8):
        tokenizer.enable_truncation(limit, strategy="longest_first")
        for first in range(1, 9):
            for second in range(1, 9):
                ids = tokenizer.encode("a " * first, "b " * second).ids
                assert pair_lengths(first, second, limit) == (ids.count(0), ids.count(1))


def test_ids_without_the_special_tokens_are_cut_at_the_limit() -> None:
    special = ((1,), (2,))
    assert cut_tokens([5, 6, 7, 8], 3, "end", special) == [5, 6, 7]
    assert cut_tokens([1, 6, 7, 2], 2, "end", special) == [1, 6]
    assert cut_tokens([1, 6, 7, 8, 2], 4, "start", special).cut == 1


async def test_rows_are_not_padded_where_padding_changes_them() -> None:
    class Padding(Encoder):
        def tokenize(self, text: str, prompt: str = "") -> list[int]:
            return [1, *[len(word) for word in (prompt + text).split()], 2]

        def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
            super().encode(token_lists)
            longest = max(map(len, token_lists))
            return np.array([(longest - len(ids), 1) for ids in token_lists], np.float32)

    lengths = []
    for tries in (False, True):
        encoder = Padding()
        engine = open_with(encoder, Prompts(), tries_padding=tries)
        encoder.batches.clear()
        await engine.embed(["a", "b b", "c", "d d"])
        lengths.append(sorted(len(batch) for batch in encoder.batches))
        await engine.close()
    assert lengths == [[4], [2, 2]]


async def test_a_model_that_cannot_compute_is_refused_when_it_is_opened() -> None:
    class Broken(Encoder):
        def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
            raise RequestError(f"no such operator for {len(token_lists)}")

    with pytest.raises(BrokenModel, match="no such operator"):
        open_with(Broken(), Prompts(), tries_padding=True)
