"""Embedding models on sentence-transformers."""

import gc
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineOptions, ModelInfo
from backends.embedding.engine import EmbeddingEngine, read_pooling
from backends.embedding.pooling import unit
from backends.hf.config import HfFolder
from backends.hf.header import broken, read_json, read_text
from backends.hf.tokenizer import HfTokenizer
from core.errors import BackendUnavailable, EngineFailed
from core.units import MIB

_MAX_BATCH_TOKENS = 8192
_SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")


def device() -> str:
    """Return where models run: Metal where it is, else the CPU."""
    import torch

    return "mps" if torch.backends.mps.is_available() else "cpu"


def open_embedder(
    info: ModelInfo, folder: HfFolder, options: EngineOptions, dtype: Any
) -> EmbeddingEngine:
    """Load the model and open its engine; blocks.  Raises BrokenModel, BackendUnavailable."""
    import torch

    if importlib.util.find_spec("sentence_transformers") is None:
        raise BackendUnavailable(
            "sentence-transformers is not installed; run scripts/setup", param="model"
        )
    pooling = read_pooling(folder.path)
    _check_modules(folder.path)
    tokenizer = HfTokenizer(folder.path)
    torch.set_num_threads(options.threads)
    models = [_load(info, folder, dtype)]
    context = min(info.context_length, pooling.max_tokens or info.context_length)
    context = min(context, options.context_tokens or context)

    def encode(token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        # Threads are set on the thread that computes.
        torch.set_num_threads(options.threads)
        vectors = _encode(models[0], token_lists)
        return unit(vectors) if pooling.normalize else vectors

    def close() -> None:
        models.clear()
        gc.collect()

    return EmbeddingEngine(
        info,
        lambda text: tokenizer.encode_for_embedding(text, None),
        encode,
        close,
        context_tokens=context,
        vocabulary_size=int(info.details["vocabulary_size"]),
        max_batch_tokens=max(context, min(options.prefill_chunk_tokens * 4, _MAX_BATCH_TOKENS)),
        max_waiting=options.max_waiting,
    )


def _check_modules(folder: Path) -> None:
    """Refuse modules outside of the library or the folder, and arguments for their classes."""
    for name in _SETTINGS:
        try:
            config = read_json(folder / name)
        except FileNotFoundError:
            continue
        for key, value in config.items():
            if value and key.endswith(("_args", "_kwargs", "_path")):
                raise broken(folder / name, f"its {key[:40]!r} is not supported")
    listing = folder / "modules.json"
    try:
        modules = json.loads(read_text(listing, MIB))
    except FileNotFoundError:
        return
    for module in modules:
        kind, path = module["type"], module.get("path", "")
        if not kind.startswith("sentence_transformers."):
            raise broken(listing, f"the module {kind[:80]!r} is not the library's own")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise broken(listing, "a module lies outside of the folder")


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
            # Named here, so that no configuration can ask for a kernel from the network.
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
