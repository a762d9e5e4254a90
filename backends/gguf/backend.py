"""The GGUF backend: runs models on llama.cpp through llama-cpp-python's low-level API."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from backends.engine.batching import BatchingEngine
from backends.gguf.embedding import open_embedder
from backends.gguf.file import gguf_info
from backends.gguf.memory import estimate_gguf, kv_element_bytes
from backends.gguf.model import GgufModel, library
from backends.gguf.stepper import GgufStepper
from backends.prompt.chat_format import ChatFormat
from backends.prompt.infill import read_infill
from backends.prompt.prepare import Preparer
from core.types import Capability, SamplingParams

_MAX_TEMPERATURE = 100.0
_MAX_TOP_K = 2**31 - 1


class GgufBackend(Backend):
    """Runs GGUF files that llama.cpp can load."""

    name: ClassVar[str] = "gguf"
    reserves_kv: ClassVar[bool] = True

    def availability(self) -> Availability:
        """Available where llama-cpp-python is installed."""
        if importlib.util.find_spec("llama_cpp") is None:
            return Availability(False, "llama-cpp-python is not installed; run scripts/setup")
        return Availability(True)

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import llama.cpp."""
        del info, options
        library()

    def identify(self, path: Path) -> ModelInfo:
        """Read the file's metadata with a bounded reader; calls no native code."""
        return gguf_info(path)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return weights, KV cache and compute buffers in bytes."""
        return estimate_gguf(info, options)

    def kv_types(self, info: ModelInfo) -> Mapping[str, float]:
        """Return the KV cache types that the model's heads allow, with bytes per element."""
        return kv_element_bytes(info)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks while the weights are read."""
        granted = self.estimate(info, options)
        options = options.granted(granted)
        if info.capabilities & {Capability.EMBEDDING, Capability.RERANK}:
            return open_embedder(info, options)
        model = GgufModel(info.files[0])
        try:
            return _open_generator(info, model, options)
        except BaseException:
            model.close()
            raise


def _open_generator(info: ModelInfo, model: GgufModel, options: EngineOptions) -> Engine:
    assert options.context_tokens is not None
    bos = model.special_text("bos")
    chat = ChatFormat(
        info.chat_template,
        bos,
        model.special_text("eos"),
        tool_parser=options.tool_parser,
        tool_template=info.tool_template,
        rag_template=info.rag_template,
    )
    for each in chat.formats:
        model.show(*each.markers)
    preparer = Preparer(
        info,
        model,
        chat,
        context_tokens=options.context_tokens,
        bos_text=bos if model.adds_bos else "",
        defaults=recommended_sampling(info),
        infill=read_infill(info.details),
        stable_prompts=options.stable_prompts,
    )
    return BatchingEngine(
        info,
        preparer,
        lambda: GgufStepper(info, model, options),
        max_waiting=options.max_waiting,
    )


def recommended_sampling(info: ModelInfo) -> SamplingParams:
    """Return the sampling parameters that the file's `general.sampling.*` keys recommend.

    Invalid values are ignored.
    """
    details = info.details

    def number(key: str, high: float) -> float | None:
        value = details.get(f"sampling_{key}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if 0 <= value <= high else None

    top_k = number("top_k", _MAX_TOP_K)
    return SamplingParams(
        temperature=number("temp", _MAX_TEMPERATURE),
        top_p=number("top_p", 1.0) or None,
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p", 1.0),
    )
