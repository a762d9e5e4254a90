"""Embeddings from decoders on MLX, pooled as their sentence-transformers folders describe."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions, ModelInfo
from backends.embedding.batch import BatchLimits
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

    Raises UnsupportedCapability if mlx-lm gives no access to the model's last hidden states.
    """
    pooling = read_pooling(folder.path)
    tokenizer = HfTokenizer(folder.path)
    context = min(options.context_tokens or info.context_length, pooling.max_tokens or 1 << 30)

    def open_model() -> MlxEmbeddingModel:
        model = load()
        if not callable(getattr(model.model, "model", None)):
            model.close()
            raise UnsupportedCapability(
                f"The model {info.name} cannot embed: mlx-lm gives no access to its hidden states.",
                param="model",
            )
        return MlxEmbeddingModel(model, tokenizer, pooling)

    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=context,
        batch_limits=BatchLimits(max(options.prefill_chunk_tokens, context)),
        max_waiting=options.max_waiting,
    )


class MlxEmbeddingModel:
    """A decoder whose last hidden states are pooled; implements `EmbeddingModel`."""

    def __init__(self, model: MlxModel, tokenizer: HfTokenizer, pooling: Pooling) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self.vocabulary_size = min(tokenizer.vocabulary_size, model.vocabulary_size)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text` with the model's special tokens."""
        return self._tokenizer.encode_for_embedding(text)

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""
        return self._tokenizer.fewest_tokens(text, limit)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the pooled vectors (len(token_lists), dimension).

        Padding is on the right, where the causal mask of a decoder hides it.
        """
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        longest = max(map(len, token_lists))
        tokens = np.zeros((len(token_lists), longest), np.int32)
        mask = np.zeros((len(token_lists), longest), np.float32)
        for row, ids in enumerate(token_lists):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        with mx.stream(generation_stream):
            decoder = self._model.model.model
            hidden = np.array(decoder(mx.array(tokens)).astype(mx.float32))
        mx.clear_cache()
        return pool(hidden, mask, self._pooling)

    def close(self) -> None:
        """Free the weights."""
        self._model.close()
