"""Vectors and relevance scores from ONNX encoders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions, ModelInfo
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.folder import EmbeddingSettings, read_settings
from backends.embedding.head import VectorHead
from backends.embedding.inputs import padded
from backends.embedding.relevance import ScoreActivation, read_activation
from backends.embedding.texts import TextInputs
from backends.hf.tokenizer import HfTokenizer
from backends.onnx.info import OnnxModel
from backends.onnx.layout import EncoderLayout
from backends.onnx.session import open_session
from core.errors import EngineFailed

BATCH_TOKENS = 2048


def open_encoder(
    info: ModelInfo, model: OnnxModel, layout: EncoderLayout, options: EngineOptions
) -> Engine:
    """Load an embedding or reranking model and open its engine; blocks.  Raises BrokenModel."""
    assert options.context_tokens is not None
    root = Path(str(info.details.get("tokenizer_folder") or model.root))
    tokenizer = HfTokenizer(root)
    settings = EmbeddingSettings() if layout.is_scored else read_settings(root)
    if settings.lower_case:
        tokenizer.lower_texts()
    config = model.folder.config if model.folder is not None else {}
    pad_id = config.get("pad_token_id")
    pad_id = pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0

    def open_model() -> OnnxEncoder:
        session = open_session(model.graph.path, options.threads)
        if layout.is_scored:
            return OnnxReranker(session, layout, tokenizer, pad_id, read_activation(root, config))
        return OnnxEmbedder(session, layout, tokenizer, pad_id, VectorHead(settings))

    # A graph alone does not say it; its tokenizer may come from another folder.
    context = min(options.context_tokens, settings.max_tokens or options.context_tokens)
    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=context,
        batch_limits=BatchLimits(
            max(context, BATCH_TOKENS), max_rows=None if layout.is_batchable else 1
        ),
        max_waiting=options.max_waiting,
        prompts=settings.prompts,
        truncates=tokenizer.truncation_side,
        is_unit=settings.is_unit,
        tries_padding=layout.is_batchable,
    )


class OnnxEncoder(TextInputs, ABC):
    """An encoder's onnxruntime session."""

    def __init__(
        self, session: Any, layout: EncoderLayout, tokenizer: HfTokenizer, pad_id: int
    ) -> None:
        super().__init__(tokenizer)
        self._session: Any = session
        self._layout = layout
        self._pad_id = pad_id
        self._has_types = tokenizer.has_types

    def _run(self, token_lists: Sequence[Sequence[int]]) -> Any:
        """Return the output of one batch and its inputs.  Raises EngineFailed."""
        inputs = padded(token_lists, self._pad_id, self._layout.length)
        made = {
            "input_ids": inputs.ids,
            "attention_mask": inputs.mask,
            "token_type_ids": inputs.types if self._has_types else np.zeros_like(inputs.types),
        }
        feeds = {name: made[name].astype(dtype) for name, dtype in self._layout.dtypes.items()}
        try:
            (output,) = self._session.run([self._layout.output], feeds)
        except Exception as problem:
            reason = " ".join(str(problem).split())[:500]
            raise EngineFailed(f"onnxruntime failed: {reason}") from problem
        return output, inputs

    @abstractmethod
    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector per list.  Raises EngineFailed."""

    def close(self) -> None:
        """Free the weights."""
        self._session = None


class OnnxEmbedder(OnnxEncoder):
    """Gives vectors; implements `EmbeddingModel`."""

    def __init__(
        self,
        session: Any,
        layout: EncoderLayout,
        tokenizer: HfTokenizer,
        pad_id: int,
        head: VectorHead,
    ) -> None:
        super().__init__(session, layout, tokenizer, pad_id)
        self._head = head

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the pooled vectors (len(token_lists), dimension).  Raises EngineFailed."""
        output, inputs = self._run(token_lists)
        if self._layout.is_pooled:
            return self._head.finish(output)
        return self._head.pool(output, inputs)


class OnnxReranker(OnnxEncoder):
    """Gives scores of pairs of texts; implements `PairModel`."""

    def __init__(
        self,
        session: Any,
        layout: EncoderLayout,
        tokenizer: HfTokenizer,
        pad_id: int,
        activation: ScoreActivation,
    ) -> None:
        super().__init__(session, layout, tokenizer, pad_id)
        self._activation = activation

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the scores (len(token_lists), 1).  Raises EngineFailed."""
        output, _ = self._run(token_lists)
        return self._activation.scores(output)
