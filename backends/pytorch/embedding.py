"""Vectors and relevance scores from transformers models on PyTorch."""

import gc
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineOptions, ModelInfo
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.folder import EmbeddingSettings, read_settings
from backends.embedding.head import VectorHead
from backends.embedding.inputs import PaddedInputs, padded
from backends.embedding.relevance import read_activation
from backends.embedding.texts import TextInputs
from backends.hf.config import HfFolder
from backends.hf.tokenizer import HfTokenizer
from backends.pytorch.weights import load_tensors
from core.errors import EngineFailed
from core.types import Capability

Task: TypeAlias = Literal["text generation", "embeddings", "reranking"]

_MAX_BATCH_TOKENS = 8192
# Source: transformers' FNet, which mixes all positions of a row and has no attention mask.
_WITHOUT_MASK = frozenset({"fnet"})


def open_encoder(
    info: ModelInfo, folder: HfFolder, options: EngineOptions, load: Callable[[Task], Any]
) -> EmbeddingEngine:
    """Load an embedding or reranking model and open its engine; blocks.

    `load` returns the transformers model for a task.  Raises BrokenModel, InsufficientMemory.
    """
    reranks = Capability.RERANK in info.capabilities
    settings = EmbeddingSettings() if reranks else read_settings(folder.path)
    tokenizer = HfTokenizer(folder.path)
    if settings.lower_case:
        tokenizer.lower_texts()
    context = min(info.context_length, options.context_tokens or info.context_length)

    def open_model() -> TransformersEncoder:
        import torch

        # PyTorch keeps this setting per thread, so it is set on the engine's.
        torch.set_num_threads(options.threads)
        if reranks:
            return TransformersReranker(load("reranking"), tokenizer, folder)
        return TransformersEmbedder(load("embeddings"), tokenizer, folder, settings)

    pad_id = folder.config.get("pad_token_id")
    has_no_padding = reranks and not folder.is_encoder and type(pad_id) is not int
    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=context,
        batch_limits=BatchLimits(
            max(context, min(options.prefill_chunk_tokens * 4, _MAX_BATCH_TOKENS)),
            max_rows=1 if has_no_padding else None,
            equal_lengths=folder.model_type in _WITHOUT_MASK,
        ),
        max_waiting=options.max_waiting,
        prompts=settings.prompts,
        truncates=tokenizer.truncation_side,
        is_unit=settings.is_unit,
        tries_padding=not has_no_padding,
    )


def check_settings(info: ModelInfo) -> None:
    """Raise BrokenModel for an embedding model with modules that are not supported; no weights."""
    if Capability.EMBEDDING in info.capabilities:
        read_settings(info.files[0].parent)


class TransformersEncoder(TextInputs, ABC):
    """A transformers model that computes whole rows; implements `EmbeddingModel`."""

    def __init__(self, model: Any, tokenizer: HfTokenizer, folder: HfFolder) -> None:
        super().__init__(tokenizer)
        self._model: Any = model
        # A tokenizer may have more ids than the model has vectors, and the other way round.
        self.vocabulary_size = int(folder.config.get("vocab_size") or tokenizer.vocabulary_size)
        pad_id = folder.config.get("pad_token_id")
        is_token = isinstance(pad_id, int) and 0 <= pad_id < self.vocabulary_size
        self._pad_id = int(pad_id or 0) if is_token else 0
        types = folder.config.get("type_vocab_size")
        self._has_types = (
            tokenizer.has_types and type(types) is int and types > 1
        ) and _accepts_types(model)

    def _run(self, inputs: PaddedInputs) -> Any:
        """Return the model's output for one batch.  Raises EngineFailed."""
        import torch

        features = {"input_ids": inputs.ids, "attention_mask": inputs.mask}
        if self._has_types:
            features["token_type_ids"] = inputs.types
        tensors = {
            name: torch.from_numpy(values).to(self._model.device)
            for name, values in features.items()
        }
        try:
            with torch.inference_mode():
                return self._model(**tensors)
        except (RuntimeError, ValueError, TypeError, IndexError) as problem:
            raise EngineFailed(f"PyTorch failed: {problem}") from problem

    @abstractmethod
    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector per list.  Raises EngineFailed."""

    def close(self) -> None:
        """Free the weights."""
        self._model = None
        gc.collect()


class TransformersEmbedder(TransformersEncoder):
    """Pools the last hidden states as the folder's sentence-transformers files say."""

    def __init__(
        self, model: Any, tokenizer: HfTokenizer, folder: HfFolder, settings: EmbeddingSettings
    ) -> None:
        super().__init__(model, tokenizer, folder)
        self._head = VectorHead(settings, _read_pickled)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the pooled vectors (len(token_lists), dimension).  Raises EngineFailed."""
        inputs = padded(token_lists, self._pad_id)
        hidden = self._run(inputs).last_hidden_state
        return self._head.pool(hidden.float().cpu().numpy(), inputs)


class TransformersReranker(TransformersEncoder):
    """Gives a pair of texts the score of its classification head; implements `PairModel`."""

    def __init__(self, model: Any, tokenizer: HfTokenizer, folder: HfFolder) -> None:
        super().__init__(model, tokenizer, folder)
        self._activation = read_activation(folder.path, folder.config)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the scores (len(token_lists), 1).  Raises EngineFailed."""
        logits = self._run(padded(token_lists, self._pad_id)).logits
        return self._activation.scores(logits.float().cpu().numpy())


def _accepts_types(model: Any) -> bool:
    return "token_type_ids" in inspect.signature(model.forward).parameters


def _read_pickled(path: Any) -> dict[str, NDArray[Any]]:
    """Read a module's weights from a PyTorch file; runs no code from it."""
    return {name: tensor.float().numpy() for name, tensor in load_tensors([path]).items()}
