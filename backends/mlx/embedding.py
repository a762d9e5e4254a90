"""Embeddings from decoders on MLX, pooled as their sentence-transformers folders describe."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions, ModelInfo
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.folder import read_settings
from backends.embedding.head import VectorHead
from backends.embedding.inputs import padded
from backends.embedding.texts import TextInputs
from backends.hf.folder import HfFolder
from backends.hf.tokenizer import HfTokenizer
from backends.mlx.metal import computing, settle_and_clear
from backends.mlx.model import MlxModel
from core.errors import BrokenModel, UnsupportedCapability
from core.types import Capability


def open_embedder(
    info: ModelInfo, folder: HfFolder, load: Callable[[], MlxModel], options: EngineOptions
) -> Engine:
    """Load the model and return its engine; blocks.

    Raises UnsupportedCapability if mlx-lm gives no access to the model's last hidden states.
    """
    settings = read_settings(folder.path)
    tokenizer = HfTokenizer(folder.path)
    if settings.lower_case:
        tokenizer.lower_texts()
    head = VectorHead(settings)
    context = min(options.context_tokens or info.context_length, settings.max_tokens or 1 << 30)

    def open_model() -> MlxEmbeddingModel:
        model = load()
        if not callable(getattr(model.model, "model", None)):
            model.close()
            raise UnsupportedCapability(
                f"The model {info.name} cannot embed: mlx-lm gives no access to its hidden states.",
                param="model",
            )
        return MlxEmbeddingModel(model, tokenizer, head)

    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=context,
        batch_limits=BatchLimits(max(options.prefill_chunk_tokens, context)),
        max_waiting=options.max_waiting,
        prompts=settings.prompts,
        truncates=tokenizer.truncation_side,
        is_unit=settings.is_unit,
        tries_padding=True,
    )


def check_encoder(info: ModelInfo) -> None:
    """Raise BrokenModel for reranking models, and for embedding models with unknown modules."""
    if Capability.RERANK in info.capabilities:
        raise BrokenModel(
            "MLX runs no reranking models; use the model's original weights (safetensors) or GGUF.",
            param="model",
        )
    if Capability.EMBEDDING in info.capabilities:
        read_settings(info.files[0].parent)


class MlxEmbeddingModel(TextInputs):
    """A decoder whose last hidden states are pooled; implements `EmbeddingModel`."""

    def __init__(self, model: MlxModel, tokenizer: HfTokenizer, head: VectorHead) -> None:
        super().__init__(tokenizer)
        self._model = model
        self._head = head
        self.vocabulary_size = min(tokenizer.vocabulary_size, model.vocabulary_size)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the pooled vectors (len(token_lists), dimension).

        Padding is on the right, where the causal mask of a decoder hides it.
        """
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        inputs = padded(token_lists)
        with computing(), mx.stream(generation_stream):
            decoder = self._model.model.model
            hidden = np.array(decoder(mx.array(inputs.ids)).astype(mx.float32))
        settle_and_clear()
        return self._head.pool(hidden, inputs)

    def close(self) -> None:
        """Free the weights."""
        self._model.close()
