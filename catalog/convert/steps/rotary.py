"""Reads the settings of positions: rotary scaling and sliding windows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Source: transformers' defaults of settings that a config.json may leave out.
_MISTRAL_WINDOW = 4096
_QWEN = ("qwen2", "qwen3")


def rope_scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration's RoPE scaling, empty if there is none or it is invalid."""
    value = config.get("rope_scaling")
    return value if isinstance(value, dict) else {}


def rope_kind(config: Mapping[str, Any]) -> str:
    """Return the kind of a configuration's RoPE scaling, such as `llama3`; else `default`."""
    scaling = rope_scaling(config)
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def llama3_factors(scaling: Mapping[str, Any], theta: float, width: int) -> NDArray[np.float32]:
    """Return the divisors of Llama 3's rotary frequencies, shape (width / 2,).

    Source: transformers, modeling_rope_utils.
    """
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    trained = float(scaling["original_max_position_embeddings"])
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    wavelengths = 2 * math.pi * theta**exponents
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def attention_window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that the layers with a sliding window see; None without such layers."""
    model_type = config.get("model_type")
    default = _MISTRAL_WINDOW if model_type == "mistral" else None
    window = config.get("sliding_window", default)
    is_on = config.get("use_sliding_window", model_type not in _QWEN)
    layers = config.get("layer_types")
    if isinstance(layers, list) and "sliding_attention" not in layers:
        return None
    return window if is_on and type(window) is int and window > 0 else None


def limit_to_window(config: dict[str, Any]) -> None:
    """Limit a configuration's context to its sliding window, in place.

    For runtimes that attend to the whole context: the text is right for as long as that is so.
    """
    window, longest = attention_window(config), config.get("max_position_embeddings")
    if window is not None and type(longest) is int and longest > window:
        config["max_position_embeddings"] = window
