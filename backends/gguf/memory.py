"""Estimates the memory of a GGUF model from its metadata, and picks a context that fits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from core.errors import InsufficientMemory
from core.types import Capability
from core.units import GIB, MIB, format_bytes

# llama.cpp's default type of keys and values.
DEFAULT_KV_TYPE = "f16"
# Bytes per element; quantized types are stored in blocks.  Source: ggml-common.h, block_q8_0 ff.
_KV_ELEMENT_BYTES = {
    "f32": 4.0,
    "bf16": 2.0,
    "f16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
_KV_BLOCK = 32
_FLOATS = ("f32", "bf16", "f16")
_F32_BYTES = 4
# llama.cpp pads the number of KV cells to this (llama_kv_cache, n_pad of a unified cache).
_CELL_PADDING = 256
_SMALLEST_CONTEXT = 256
# The shared cells should hold 2 full contexts, in at most 1/4 of the memory limit.
_WANTED_CONTEXTS = 2
_CELLS_SHARE = 4
_BASE_BYTES = 32 * MIB
_MAX_PREFIX_BYTES = GIB
# Retained cells slow every step: at most as many bytes as 1/64 of the weights.
_WARM_SHARE = 64
_MIN_WARM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    head_count_kv_sum: int
    key_length: int
    value_length: int
    embedding_length: int
    vocabulary_size: int
    state_bytes: int

    def kv_bytes_per_token(self, kv_type: str | None) -> int:
        width = self.key_length + self.value_length
        element_bytes = _KV_ELEMENT_BYTES[kv_type or DEFAULT_KV_TYPE]
        return math.ceil(self.head_count_kv_sum * width * element_bytes)


def _shape(details: Mapping[str, int | float | str | bool]) -> _Shape:
    def number(key: str, default: int = 0) -> int:
        value = details.get(key, default)
        return int(value) if isinstance(value, int | float) else default

    layers = number("n_layer")
    inner, state, kernel = (
        number("ssm_inner_size"),
        number("ssm_state_size"),
        number("ssm_conv_kernel"),
    )
    # Source: llama.cpp hparams n_embd_r and n_embd_s, one f32 state per layer and sequence.
    recurrent = layers * inner * (state + max(kernel - 1, 0)) * _F32_BYTES
    return _Shape(
        layers=layers,
        head_count_kv_sum=number("n_head_kv_sum", layers * number("n_head_kv")),
        key_length=number("key_length"),
        value_length=number("value_length"),
        embedding_length=number("n_embd"),
        vocabulary_size=number("vocabulary_size"),
        state_bytes=recurrent,
    )


def kv_element_bytes(info: ModelInfo) -> Mapping[str, float]:
    """Return the KV cache types that the model allows, with their bytes per element.

    A head must consist of whole blocks of a quantized type (Source: llama_context's
    constructor).  Embedding models have no lasting KV cache.
    """
    if info.capabilities & {Capability.EMBEDDING, Capability.RERANK}:
        return {}
    shape = _shape(info.details)
    if shape.key_length % _KV_BLOCK == shape.value_length % _KV_BLOCK == 0:
        return _KV_ELEMENT_BYTES
    return {name: _KV_ELEMENT_BYTES[name] for name in _FLOATS}


def estimate_gguf(info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
    """Return the memory of `info`, with context and KV cells chosen to fit the limit.

    The context is the trained one unless the options or the limit allow less.  All sequences
    share KV cells for one to two contexts; up to as much RAM again caches prefixes.
    Raises InsufficientMemory.
    """
    shape = _shape(info.details)
    per_token = shape.kv_bytes_per_token(options.kv_type)
    fixed_kv = shape.state_bytes * (options.max_sequences + 2)
    step_tokens = options.prefill_chunk_tokens + options.max_sequences
    transient = (
        _BASE_BYTES
        + step_tokens * shape.embedding_length * 16 * _F32_BYTES
        + options.max_sequences * shape.vocabulary_size * _F32_BYTES * 2
    )
    # Each cell also needs a row of the attention mask in each step.
    per_cell = per_token + step_tokens * _F32_BYTES
    wanted = min(options.context_tokens or info.context_length, info.context_length)
    limit = options.memory_limit_bytes
    context, cells = wanted, max(options.kv_tokens or 0, wanted)
    if limit is not None:
        free = limit - info.size_bytes - transient - fixed_kv
        most = free // per_cell if per_cell else wanted
        context = _granted(info, options, wanted, int(most), limit)
        room = limit // _CELLS_SHARE // per_cell if per_cell else context
        cells = options.kv_tokens or min(context * _WANTED_CONTEXTS, max(context, room), int(most))
    elif options.kv_tokens is None:
        cells = wanted * min(_WANTED_CONTEXTS, options.max_sequences)
    cells = max(context, cells)
    cells = -(-cells // _CELL_PADDING) * _CELL_PADDING
    used = info.size_bytes + fixed_kv + transient + cells * per_cell
    spare = cells * per_token + fixed_kv if limit is None else max(limit - used, 0)
    warm = info.size_bytes // _WARM_SHARE // per_token if per_token else 0
    return MemoryEstimate(
        weights_bytes=info.size_bytes,
        kv_bytes=cells * per_token + fixed_kv,
        transient_bytes=transient + cells * step_tokens * _F32_BYTES,
        context_tokens=context,
        kv_tokens=cells,
        prefix_bytes=min(cells * per_token + fixed_kv, spare, _MAX_PREFIX_BYTES),
        warm_tokens=max(warm, _MIN_WARM_TOKENS),
    )


def _granted(info: ModelInfo, options: EngineOptions, wanted: int, most: int, limit: int) -> int:
    """Return the context that fits: `wanted`, or less unless the user set it."""
    most -= most % _CELL_PADDING
    if wanted <= most:
        return wanted
    if options.context_tokens is not None and options.context_tokens <= info.context_length:
        smallest = wanted
    else:
        smallest = min(_SMALLEST_CONTEXT, wanted)
    if most < smallest:
        raise InsufficientMemory(
            f"The model {info.name} ({format_bytes(info.size_bytes)} of weights) with a context of "
            f"{smallest} tokens does not fit into the {format_bytes(limit)} that models may use. "
            "Choose a smaller context or quantization, or unload other models.",
            param="model",
        )
    return most
