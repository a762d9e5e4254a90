"""Embeddings from models on sentence-transformers."""

import gc
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineOptions, ModelInfo
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.pooling import Pooling, read_pooling, unit
from backends.hf.config import HfFolder
from backends.hf.header import broken, read_json, read_text
from backends.hf.tokenizer import HfTokenizer
from core.errors import BackendUnavailable, EngineFailed
from core.units import MIB

_MAX_BATCH_TOKENS = 8192
_SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")


def device() -> str:
    """Return the device that models run on: Metal if available, else the CPU."""
    import torch

    return "mps" if torch.backends.mps.is_available() else "cpu"


def open_embedder(
    info: ModelInfo, folder: HfFolder, options: EngineOptions, dtype: Any
) -> EmbeddingEngine:
    """Load the model and open its engine; blocks.  Raises BrokenModel, BackendUnavailable."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise BackendUnavailable(
            "sentence-transformers is not installed; run scripts/setup", param="model"
        )
    pooling = read_pooling(folder.path)
    _check_modules(folder.path)
    tokenizer = HfTokenizer(folder.path)
    context = min(info.context_length, pooling.max_tokens or info.context_length)
    context = min(context, options.context_tokens or context)

    def open_model() -> PytorchEmbeddingModel:
        import torch

        # PyTorch keeps this setting per thread, so it is set on the engine's.
        torch.set_num_threads(options.threads)
        return PytorchEmbeddingModel(_load(info, folder, dtype), tokenizer, pooling, info)

    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=context,
        batch_limits=BatchLimits(
            max(context, min(options.prefill_chunk_tokens * 4, _MAX_BATCH_TOKENS))
        ),
        max_waiting=options.max_waiting,
    )


class PytorchEmbeddingModel:
    """A SentenceTransformer without its tokenizer; implements `EmbeddingModel`."""

    def __init__(
        self, model: Any, tokenizer: HfTokenizer, pooling: Pooling, info: ModelInfo
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self.vocabulary_size = int(info.details["vocabulary_size"])

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text` with the model's special tokens."""
        return self._tokenizer.encode_for_embedding(text)

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""
        return self._tokenizer.fewest_tokens(text, limit)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the pooled vectors (len(token_lists), dimension).  Raises EngineFailed."""
        vectors = _encode(self._model, token_lists)
        return unit(vectors) if self._pooling.normalize else vectors

    def close(self) -> None:
        """Free the weights."""
        self._model = None
        gc.collect()


def _check_modules(folder: Path) -> None:
    """Raise BrokenModel for modules outside the library or folder, and for class arguments."""
    for name in _SETTINGS:
        try:
            config = read_json(folder / name)
        except FileNotFoundError:
            continue
        for key, value in config.items():
            if value and key.endswith(("_args", "_kwargs", "_path")):
                raise broken(folder / name, f"its setting {key[:40]!r} is not supported")
    listing = folder / "modules.json"
    try:
        modules = json.loads(read_text(listing, MIB))
    except FileNotFoundError:
        return
    for module in modules:
        kind, path = module["type"], module.get("path", "")
        if not kind.startswith("sentence_transformers."):
            raise broken(listing, f"the module {kind[:80]!r} is not part of sentence-transformers")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise broken(listing, "a module has a path outside the folder")


def _load(info: ModelInfo, folder: HfFolder, dtype: Any) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    def load(attention: str) -> Any:
        return SentenceTransformer(
            str(folder.path),
            device=device(),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={
                "dtype": dtype,
                "attn_implementation": attention,
                "use_safetensors": info.files[0].suffix == ".safetensors",
            },
        )

    try:
        try:
            # Set explicitly, so that no configuration can request a kernel from the network.
            return load("sdpa").eval()
        except ValueError as problem:
            if "scaled_dot_product_attention" not in str(problem):
                raise
            return load("eager").eval()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
        raise broken(info.files[0], f"sentence-transformers cannot load it: {reason}") from problem


def _encode(model: Any, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Return the model's vectors, float32 (len(token_lists), dimension)."""
    import torch

    longest = max(map(len, token_lists))
    ids = np.zeros((len(token_lists), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    features = {name: tensor.to(model.device) for name, tensor in features.items()}
    try:
        with torch.inference_mode():
            vectors: NDArray[np.float32] = (
                model(features)["sentence_embedding"].float().cpu().numpy()
            )
    except (RuntimeError, ValueError, TypeError) as problem:
        raise EngineFailed(f"PyTorch failed: {problem}") from problem
    return vectors
