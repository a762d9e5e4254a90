"""Embeddings by decoders that MLX runs, as sentence-transformers folders describe them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions, ModelInfo
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.pooling import Pooling, pool, read_pooling
from backends.hf.folder import HfFolder
from backends.hf.tokenizer import HfTokenizer
from backends.mlx.model import MlxModel
from core.errors import UnsupportedCapability


def open_embedder(
    info: ModelInfo, folder: HfFolder, load: Callable[[], MlxModel], options: EngineOptions
) -> Engine:
    """Load the model and return its engine; blocks.

    Raises UnsupportedCapability where the model keeps its last vectors to itself.
    """
    pooling = read_pooling(folder.path)
    tokenizer = HfTokenizer(folder.path)
    model = load()
    if not callable(getattr(model.model, "model", None)):
        model.close()
        raise UnsupportedCapability(
            f"The model {info.name} has no vectors that mlx-lm would give.", param="model"
        )
    context = min(options.context_tokens or info.context_length, pooling.max_tokens or 1 << 30)
    return EmbeddingEngine(
        info,
        tokenizer.encode_for_embedding,
        lambda inputs: encode(model.model.model, inputs, pooling),
        model.close,
        context_tokens=context,
        vocabulary_size=min(tokenizer.vocabulary_size, model.vocabulary_size),
        max_batch_tokens=max(options.prefill_chunk_tokens, context),
        max_waiting=options.max_waiting,
    )


def encode(decoder: Any, inputs: Sequence[Sequence[int]], pooling: Pooling) -> NDArray[np.float32]:
    """Return one vector per input, float32 (len(inputs), dimension).

    Padding goes to the right, where no token of a decoder looks.
    """
    import mlx.core as mx
    from mlx_lm.generate import generation_stream

    longest = max(map(len, inputs))
    tokens = np.zeros((len(inputs), longest), np.int32)
    mask = np.zeros((len(inputs), longest), np.float32)
    for index, each in enumerate(inputs):
        tokens[index, : len(each)] = each
        mask[index, : len(each)] = 1
    with mx.stream(generation_stream):
        hidden = np.array(decoder(mx.array(tokens)).astype(mx.float32))
    mx.clear_cache()
    return pool(hidden, mask, pooling)
