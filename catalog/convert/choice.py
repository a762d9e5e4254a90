"""Chooses the conversion that makes a model usable here; pure except for installed packages."""

from collections.abc import Callable, Collection
from dataclasses import replace

from backends.base import ModelInfo
from catalog.convert.graph import ORIGINAL, Conversion, conversions_from

# The fastest runtime first.
_PREFERRED = ("mlx", "gguf", "safetensors", "onnx")
_SMALLER = {
    "mlx": (("8bit", 8.5), ("6bit", 6.5), ("4bit", 4.5)),
    "gguf": (("q8_0", 8.5), ("q6_k", 6.6), ("q5_k_m", 5.7), ("q4_k_m", 4.9)),
}


def least_lossy_conversion(info: ModelInfo, runnable: Collection[str]) -> tuple[str, str] | None:
    """Return the format and quantization that lose the least precision; None if there is none.

    For models whose format cannot run here.
    """
    for conversion in _possible_conversions(info, runnable):
        if conversion.target_format == info.format:
            continue
        kept = (ORIGINAL, info.quantization, "f16")
        choices = conversion.quantizations
        return conversion.target_format, next((q for q in kept if q in choices), choices[0])
    return None


def smaller_conversion(
    info: ModelInfo, runnable: Collection[str], fits: Callable[[ModelInfo], bool]
) -> tuple[str, str] | None:
    """Return the most precise smaller variant that fits, in the most preferred format.

    `fits` is called with the predicted description of the result.
    """
    for conversion in _possible_conversions(info, runnable):
        for quantization, bits in _SMALLER.get(conversion.target_format, ()):
            result = _predicted_info(info, conversion.target_format, quantization, bits)
            is_smaller = 0 < result.size_bytes < info.size_bytes
            if quantization in conversion.quantizations and is_smaller and fits(result):
                return conversion.target_format, quantization
    return None


def _predicted_info(
    info: ModelInfo, target_format: str, quantization: str, bits: float
) -> ModelInfo:
    weights_bytes = int(info.parameters * bits / 8)
    details = {**info.details, "weights_bytes": weights_bytes, "tensor_bytes": weights_bytes}
    if target_format == "mlx":
        details |= {"mlx_bits": int(bits), "mlx_group_size": 64}
    return replace(
        info,
        format=target_format,
        quantization=quantization,
        size_bytes=weights_bytes,
        details=details,
    )


def _possible_conversions(info: ModelInfo, runnable: Collection[str]) -> list[Conversion]:
    found = [
        conversion
        for conversion in conversions_from(info)
        if conversion.is_possible
        and conversion.target_format in runnable
        and conversion.target_format in _PREFERRED
    ]
    return sorted(found, key=lambda conversion: _PREFERRED.index(conversion.target_format))
