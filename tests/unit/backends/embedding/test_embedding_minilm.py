"""The embedding engine over the starter's real weights, run by onnxruntime alone."""

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.folder import EmbeddingSettings, read_settings
from backends.embedding.pooling import Pooling, pool
from catalog.scan.starters import STARTERS, installed_starter
from tests.unit.catalog.builders import make_info


@pytest_asyncio.fixture
async def minilm() -> AsyncIterator[EmbeddingEngine]:
    """all-MiniLM-L6-v2 in int8 with the tokenizer of the other package."""
    import onnxruntime
    from tokenizers import Tokenizer

    found = [installed_starter(starter) for starter in STARTERS[1:]]
    if found[0] is None or found[1] is None:
        pytest.skip("the embedding starters are not installed")
    folder = found[0].path.parent
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(found[1].path), options)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_settings(folder)

    def encode(lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        ids = np.zeros((len(lists), max(map(len, lists))), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(lists):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return pool(session.run(["last_hidden_state"], inputs)[0], mask, settings.pooling)

    engine = EmbeddingEngine(
        make_info(format="onnx", context_length=512),
        lambda: SimpleNamespace(
            vocabulary_size=tokenizer.get_vocab_size(),
            special_tokens=((101,), (102,)),
            tokenize=lambda text, prompt: tokenizer.encode(prompt + text).ids,
            encode=encode,
            close=lambda: None,
        ),
        context_tokens=settings.max_tokens or 512,
        batch_limits=BatchLimits(512),
    )
    yield engine
    await engine.close()


def test_starter_says_how_it_is_pooled() -> None:
    starter = installed_starter(STARTERS[1])
    assert starter is not None
    assert read_settings(starter.path.parent) == EmbeddingSettings(
        Pooling("mean", True), max_tokens=256
    )


async def test_meanings_are_near(minilm: EmbeddingEngine) -> None:
    texts = ["cat", "The quarterly report is due on Friday. " * 5, "kitten"]
    embeddings = await minilm.embed(texts)
    assert embeddings.vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(embeddings.vectors, axis=1), 1, rtol=1e-5)
    cat, report, kitten = embeddings.vectors
    assert cat @ kitten > 0.6
    assert cat @ report < 0.3
    # A word and the two special tokens.
    counts = [(await minilm.embed([text])).prompt_tokens for text in texts]
    assert counts[0] == counts[2] == 3
    assert embeddings.prompt_tokens == sum(counts)


async def test_vectors_do_not_depend_on_their_neighbours(minilm: EmbeddingEngine) -> None:
    texts = [f"Text number {'very ' * index}long" for index in range(12)]
    together = (await minilm.embed(texts)).vectors
    alone = np.concatenate([(await minilm.embed([text])).vectors for text in texts])
    # Activations are rounded to int8 by the batch's own range.
    assert (np.einsum("bd,bd->b", together, alone) > 0.98).all()
