"""Estimates the memory of a transformer from a Hugging Face folder."""

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from core.errors import InsufficientMemory
from core.units import GIB, format_bytes

_F32_BYTES = 4
_BLOCK_TOKENS = 256
# KV tokens for this many full contexts are reserved; a second one gets at most 1/4 of the limit.
_TARGET_CONTEXTS = 2
_KV_LIMIT_DIVISOR = 4
_MAX_PREFIX_BYTES = GIB
# KV cells of idle prefixes may take 1/64 of the bytes of the weights, as for GGUF.
_WARM_DIVISOR = 64
_MIN_WARM_TOKENS = 64
# Activations alive at once in one layer: of the hidden size, and of the feed-forward size.
_WIDTHS_ALIVE = 16
_WIDE_ALIVE = 3


def estimate_transformer(
    info: ModelInfo,
    options: EngineOptions,
    *,
    weights_bytes: int,
    kv_element_bytes: int,
    base_bytes: int,
    logits_rows: int | None = None,
) -> MemoryEstimate:
    """Return the memory of `info`, with context and KV tokens chosen to fit the limit.

    `base_bytes` is the runtime's own memory; `logits_rows` is the number of rows of float32
    logits per step (None: one for each sequence).  Encoders have no KV cache.  The context is the
    trained one unless the options or the limit allow less; all sequences share the KV tokens of
    one to two contexts, and as much RAM again caches prefixes.  Raises InsufficientMemory.
    """
    per_token = _kv_bytes_per_token(info, kv_element_bytes)
    transient = base_bytes + _step_bytes(info, options, logits_rows)
    wanted = min(options.context_tokens or info.context_length, info.context_length)
    limit = options.memory_limit_bytes
    context, tokens = wanted, max(options.kv_tokens or 0, wanted)
    if limit is not None:
        free = limit - weights_bytes - transient
        most = free // per_token if per_token else wanted if free >= 0 else -1
        context = _fitting_context(info, options, wanted, most, weights_bytes)
        room = limit // _KV_LIMIT_DIVISOR // per_token if per_token else context
        tokens = options.kv_tokens or min(context * _TARGET_CONTEXTS, max(context, room))
        tokens = min(tokens, most)
    elif options.kv_tokens is None:
        tokens = wanted * min(_TARGET_CONTEXTS, options.max_sequences)
    tokens = max(context, tokens)
    kv_bytes = tokens * per_token
    spare = kv_bytes
    if limit is not None:
        spare = max(limit - weights_bytes - transient - kv_bytes, 0)
    warm = weights_bytes // _WARM_DIVISOR // per_token if per_token else 0
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        transient_bytes=transient,
        context_tokens=context,
        kv_tokens=tokens,
        prefix_bytes=min(kv_bytes, spare, _MAX_PREFIX_BYTES),
        warm_tokens=max(warm, _MIN_WARM_TOKENS),
    )


def _detail(info: ModelInfo, key: str, default: int = 0) -> int:
    value = info.details.get(key, default)
    return int(value) if isinstance(value, int | float) else default


def _kv_bytes_per_token(info: ModelInfo, element_bytes: int) -> int:
    """Return the bytes of one token's keys and values in all layers; 0 for encoders."""
    if info.details.get("is_encoder"):
        return 0
    head_dim = _detail(info, "head_dim")
    widths = head_dim + _detail(info, "value_head_dim", head_dim)
    return _detail(info, "n_layer") * _detail(info, "n_head_kv") * widths * element_bytes


def _step_bytes(info: ModelInfo, options: EngineOptions, logits_rows: int | None) -> int:
    """Return the bytes of one step's activations and logits."""
    step_tokens = options.prefill_chunk_tokens + options.max_sequences
    width = _WIDTHS_ALIVE * _detail(info, "n_embd") + _WIDE_ALIVE * _detail(info, "n_ff")
    rows = options.max_sequences if logits_rows is None else logits_rows
    logits = rows * _detail(info, "vocabulary_size") * 2
    return (step_tokens * width + logits) * _F32_BYTES


def _fitting_context(
    info: ModelInfo, options: EngineOptions, wanted: int, most: int, weights_bytes: int
) -> int:
    """Return the context that fits: `wanted`, or less if the user did not set it."""
    if wanted <= most:
        return wanted
    most -= most % _BLOCK_TOKENS
    is_fixed = options.context_tokens is not None and options.context_tokens <= info.context_length
    smallest = wanted if is_fixed else min(_BLOCK_TOKENS, wanted)
    if most < smallest:
        raise InsufficientMemory(
            f"The model {info.name} ({format_bytes(weights_bytes)} of weights) does not fit into "
            f"the {format_bytes(options.memory_limit_bytes or 0)} that models may use with a "
            f"context of {smallest} tokens; use a smaller quantization or context.",
            param="model",
        )
    return most
