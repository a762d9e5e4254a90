"""Estimates the memory of an MLX model, and decides whether to dequantize its weights."""

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from backends.hf.memory import estimate_transformer
from backends.mlx.metal import has_metal
from backends.mlx.model import CACHE_BYTES
from core.errors import InsufficientMemory
from core.units import GIB, MIB

_F32_BYTES = 4
_HALF_BYTES = 2
# Without a GPU, dequantizing is worth its memory only for small models.
_LARGEST_DENSE_BYTES = 4 * GIB
_RUNTIME_BYTES = 192 * MIB


def is_quantized(info: ModelInfo) -> bool:
    """Whether the weights have MLX's own quantization."""
    return "mlx_bits" in info.details


def dense_bytes(info: ModelInfo) -> int:
    """Return the size of all weights as float32."""
    return info.parameters * _F32_BYTES


def wants_dense(info: ModelInfo, options: EngineOptions) -> bool:
    """Whether to dequantize weights: on a CPU, dense products are many times faster."""
    if has_metal() or not is_quantized(info) or dense_bytes(info) > _LARGEST_DENSE_BYTES:
        return False
    if info.details.get("mlx_keeps_packed"):
        return False
    try:
        _estimate(info, options, dense_bytes(info))
    except InsufficientMemory:
        return False
    return True


def estimate_mlx(info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
    """Return weights, KV cache and compute buffers in bytes.  Raises InsufficientMemory."""
    return _estimate(info, options, _weights_bytes(info, options))


def _weights_bytes(info: ModelInfo, options: EngineOptions) -> int:
    stored = int(info.details.get("weights_bytes", info.size_bytes))
    if has_metal():
        return stored
    if not is_quantized(info):
        return dense_bytes(info)
    if wants_dense(info, options):
        return dense_bytes(info)
    # Quantized weights stay as stored; their 16-bit scales become float32.
    return stored + stored // 8


def _estimate(info: ModelInfo, options: EngineOptions, weights_bytes: int) -> MemoryEstimate:
    return estimate_transformer(
        info,
        options,
        weights_bytes=weights_bytes,
        kv_element_bytes=_kv_bytes(info),
        base_bytes=_RUNTIME_BYTES + CACHE_BYTES,
        logits_rows=options.max_sequences,
    )


def _kv_bytes(info: ModelInfo) -> int:
    if not has_metal() or info.quantization == "f32":
        return _F32_BYTES
    return _HALF_BYTES
