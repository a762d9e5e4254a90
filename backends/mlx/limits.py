"""Settings of a model that mlx-lm's code does not read; finds them in its source, imports nothing.

A coarse check for machines where mlx-lm's results cannot be compared with transformers'.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from backends.mlx.model import module_source

_SIBLING = re.compile(r"^from \.(\w+) import|^from \. import (\w+)", re.MULTILINE)
# Modules that any architecture uses: that they know a setting says nothing.
_SHARED = frozenset({"activations", "base", "cache", "pipeline", "rope_utils", "switch_layers"})
_ACTIVATIONS = ("silu", "gelu", "relu")
_ACTIVATION_WORDS = {"silu": r"silu|swiglu|switchglu", "gelu": r"gelu|geglu", "relu": r"relu"}


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and value != 1


def _has_zero(value: Any) -> bool:
    return isinstance(value, list) and 0 in value


# Settings that change what a model computes, and when they do.
_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "partial_rotary_factor", "rotary_pct", "attention_multiplier", "residual_multiplier",
            "embedding_multiplier", "logits_scaling", "logit_scale",
        ),
        _is_scale,
    ),
    **dict.fromkeys(
        (
            "attn_logit_softcapping", "final_logit_softcapping", "alibi", "clip_qkv",
            "attention_chunk_size", "sliding_window", "rope_scaling",
        ),
        bool,
    ),
    "no_rope_layers": _has_zero,
}  # fmt: skip


def unread_setting(model_type: str, config: Mapping[str, Any]) -> str:
    """Return which setting of the flattened `config` mlx-lm ignores, empty if none is known."""
    text = _source(model_type)
    for key, is_active in _SETTINGS.items():
        if is_active(config.get(key)) and not _is_off(key, config, text) and key not in text:
            return f"mlx-lm's code for {model_type[:60]} does not read {key}"
    return _unknown_rope(model_type, config, text) or _other_activation(model_type, config, text)


def _is_off(key: str, config: Mapping[str, Any], text: str) -> bool:
    """Whether a setting has no effect, or is read under another name."""
    if key == "sliding_window":
        length, window = config.get("max_position_embeddings"), config[key]
        if isinstance(length, int) and isinstance(window, int) and window >= length:
            return True
        return config.get("use_sliding_window") is False
    # Newer code reads the same settings from rope_parameters.
    is_read = "rope_parameters" in text
    return key == "rope_scaling" and (is_read or _rope_type(config) in ("", "default"))


def _rope_type(config: Mapping[str, Any]) -> str:
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return ""
    return str(scaling.get("rope_type") or scaling.get("type") or "")


def _unknown_rope(model_type: str, config: Mapping[str, Any], text: str) -> str:
    kind = _rope_type(config)
    if kind in ("", "default"):
        return ""
    known = text + (module_source("rope_utils") if "initialize_rope" in text else "")
    if f'"{kind}"' in known:
        return ""
    return f"mlx-lm's code for {model_type[:60]} does not know the rotary type {kind[:40]!r}"


def _other_activation(model_type: str, config: Mapping[str, Any], text: str) -> str:
    value = config.get("hidden_act") or config.get("hidden_activation")
    kind = next((name for name in _ACTIVATIONS if name in str(value).lower()), "")
    if not kind or "hidden_act" in text or re.search(_ACTIVATION_WORDS[kind], text.lower()):
        return ""
    return f"mlx-lm's code for {model_type[:60]} does not compute the activation {str(value)[:40]}"


@cache
def _source(model_type: str) -> str:
    """Return the text of an architecture's module and of those that it is built on."""
    texts, waiting, seen = [], [model_type], set(_SHARED)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            texts.append(module_source(name))
            waiting += [one or other for one, other in _SIBLING.findall(texts[-1])]
    return "\n".join(texts)
