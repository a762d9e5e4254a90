"""ONNX backend on plain onnxruntime: decoders with past key values, and embedding models.

onnxruntime-genai is not used: its engine is slower with several streams and reads only folders
that its own builder wrote.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from backends.engine.row_model import RowModel
from backends.engine.row_stepper import RowStepper
from backends.engine.trial.checks import TrialTerms
from backends.engine.trial.results import tried_rows
from backends.hf.engine import open_token_engine
from backends.hf.memory import estimate_transformer
from backends.hf.tokenizer import HfTokenizer
from backends.onnx.embedding import BATCH_TOKENS, open_encoder
from backends.onnx.info import OnnxModel, onnx_info, read_model
from backends.onnx.layout import DecoderLayout, EncoderLayout
from backends.onnx.padded_rows import PaddedRows
from backends.onnx.ragged_rows import RaggedRows
from backends.onnx.session import DecoderSession, chunk_tokens, open_session
from backends.stepper import Stepper
from core.units import MIB

_BASE_BYTES = 64 * MIB
_F32_BYTES = 4
_DEFAULT_HEADS = 12
# Attention in plain operators holds the scores, their softmax and one copy at the same time.
_LIVE_SCORE_COPIES = 3
# Each running row may have a finished one beside it, whose prefix is reused.
_ROWS_PER_SEQUENCE = 2


class OnnxBackend(Backend):
    """Runs `.onnx` files of text decoders with past key values and of text encoders."""

    name: ClassVar[str] = "onnx"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 192 * MIB
    reserves_kv: ClassVar[bool] = False

    def availability(self) -> Availability:
        """Available where onnxruntime is installed."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed; run scripts/setup")
        return Availability(True)

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import onnxruntime."""
        del info, options
        importlib.import_module("onnxruntime")

    def identify(self, path: Path) -> ModelInfo:
        """Read the graph with size limits, without native code."""
        return onnx_info(path)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return weights, KV cache and activations in bytes."""
        weights_bytes = _number(info, "weights_bytes") or info.size_bytes
        if info.details.get("is_encoder"):
            # A text is computed in one piece, so a batch holds at least the longest one.
            tokens = max(info.context_length, BATCH_TOKENS)
            heads = _number(info, "n_head") or _DEFAULT_HEADS
            scores = tokens * info.context_length * heads * _F32_BYTES * _LIVE_SCORE_COPIES
            estimated = estimate_transformer(
                info,
                replace(options, prefill_chunk_tokens=tokens),
                weights_bytes=weights_bytes,
                kv_element_bytes=0,
                base_bytes=_BASE_BYTES + scores,
                logits_rows=0,
            )
            return replace(estimated, prefix_bytes=0)
        element_bytes = np.dtype(str(info.details["kv_dtype"])).itemsize
        if info.details.get("batching") != "ragged":
            # Each step reads the old cache and writes a new one.
            element_bytes *= 2
        rows = min(options.prefill_chunk_tokens, chunk_tokens(_number(info, "vocabulary_size")))
        estimated = estimate_transformer(
            info,
            options,
            weights_bytes=weights_bytes,
            kv_element_bytes=element_bytes,
            base_bytes=_BASE_BYTES,
            logits_rows=max(rows, options.max_sequences),
        )
        # Prefixes are kept in rows of the KV cache only.
        return replace(estimated, prefix_bytes=0)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks while onnxruntime reads and optimises the graph."""
        granted = self.estimate(info, options)
        options = options.granted(granted)
        model = read_model(info.files[0])
        if isinstance(model.layout, EncoderLayout):
            return open_encoder(info, model, model.layout, options)
        return _open_decoder(info, model, model.layout, options)


def _number(info: ModelInfo, key: str) -> int:
    value = info.details.get(key, 0)
    return int(value) if isinstance(value, int | float) else 0


def _open_decoder(
    info: ModelInfo, model: OnnxModel, layout: DecoderLayout, options: EngineOptions
) -> Engine:
    folder = model.folder
    assert folder is not None
    assert options.context_tokens is not None
    tokenizer = HfTokenizer(model.root)
    tokenizer.add_ends(model.end_ids)

    def open_stepper() -> Stepper:
        rows, limitations = tried_rows(
            info,
            open_rows(model, layout, options),
            TrialTerms.of(info, folder.config, options.context_tokens),
            options,
            packages=("onnxruntime",),
        )
        stepper = RowStepper(rows, tokenizer, options)
        stepper.limitations = limitations
        return stepper

    return open_token_engine(
        info,
        folder,
        tokenizer,
        open_stepper,
        options,
        context_tokens=options.context_tokens,
    )


def open_rows(model: OnnxModel, layout: DecoderLayout, options: EngineOptions) -> RowModel:
    """Load a decoder; blocks.  `options.kv_tokens` must be set.  Raises BrokenModel."""
    assert options.kv_tokens is not None
    session = DecoderSession(open_session(model.graph.path, options.threads), layout)
    max_rows = options.max_sequences * _ROWS_PER_SEQUENCE
    if layout.is_ragged:
        return RaggedRows(session, max_rows=max_rows, kv_tokens=options.kv_tokens)
    return PaddedRows(session, max_rows=max_rows)
