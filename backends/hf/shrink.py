"""Scales a model's configuration down, keeping what decides how it computes; pure.

Two runtimes can then be compared on a model of a few megabytes in place of the real one.  Widths of
heads, rotary settings, activations, norms and the kinds of layers stay; counts and widths shrink.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from backends.hf.config import HEAD_KEYS, HEAD_WIDTH_KEYS, HIDDEN_KEYS, KV_HEAD_KEYS, LAYER_KEYS

# Sliding windows become this long, so that a short prompt is longer.
WINDOW_TOKENS = 12

_WIDE = 512
_LATENT_WIDTH = 256
_INNER = 128
_RANK = 64
_VOCABULARY = 512
_EXPERTS = 8
_USED_EXPERTS = 2
_LEAST_LAYERS = 4
_MOST_LAYERS = 16

_LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
_VOCABULARY_KEYS = re.compile(r"(padded_)?vocab_size.*")
_TOKEN_KEYS = re.compile(r".*_token_(id|ids|index)")
_INNER_KEYS = re.compile(r".*(intermediate|ffn|n_inner|d_ff|feed_forward|ff_dim|mlp_hidden).*")
_RANK_KEYS = re.compile(r".*(lora_rank|_rank)")
_SIZE_KEYS = re.compile(r".*(size|dim|width|inner|d_ssm)")
_EXPERT_KEYS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts|num_routed_experts")
_USED_KEYS = re.compile(
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k"
)
_WINDOW_KEYS = re.compile(
    r"(sliding|attention|attn|local)_(window|chunk)(_size)?|window_size|local_attention"
)
_PERIOD_KEYS = re.compile(r".*(interval|pattern|period|every|freq|step|offset)(_.*)?")
_INDEX_KEYS = re.compile(r".*(layers?|ids|idxs?|indices|indexes)")
_DROPPED = ("quantization_config", "quantization", "dtype", "torch_dtype")


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that computes as `config` does, with far fewer parameters.

    It may be inconsistent for architectures with unusual settings: building a model of it then
    fails, which says nothing about `config`.
    """
    small = {
        key: shrink(value) if isinstance(value, Mapping) and "rope" not in key else value
        for key, value in config.items()
        if key not in _DROPPED
    }
    widths = _widths(small)
    layers = _layer_count(small)
    hidden = _first(small, HIDDEN_KEYS)
    for key, value in small.items():
        if type(value) is int:
            small[key] = widths.get(key, _shrunk(key, value, hidden, widths))
        elif isinstance(value, list):
            small[key] = _shrunk_list(key, value, _first(small, LAYER_KEYS), layers)
        elif isinstance(value, dict) and layers and value and all(map(_is_index, value)):
            small[key] = {index: one for index, one in value.items() if int(index) < layers}
    _fit_layers(small, config, layers)
    _fit_groups(small)
    return small


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> int:
    return next((config[key] for key in keys if type(config.get(key)) is int), 0)


def _key(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    return next((key for key in keys if type(config.get(key)) is int), "")


def _widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the new hidden size and numbers of heads, by key; empty if they are small enough."""
    hidden, heads = _first(config, HIDDEN_KEYS), _first(config, HEAD_KEYS)
    if hidden <= _WIDE:
        return {}
    if not heads:
        return {_key(config, HIDDEN_KEYS): _LATENT_WIDTH}
    kv_heads = _first(config, KV_HEAD_KEYS) or heads
    if kv_heads > heads or heads % kv_heads:
        return {}
    few_kv = min(kv_heads, 2)
    few = few_kv * min(heads // kv_heads, 2)
    head_width = _first(config, HEAD_WIDTH_KEYS) or hidden // heads
    width = _LATENT_WIDTH if config.get("kv_lora_rank") else few * head_width
    found = {_key(config, HIDDEN_KEYS): width, _key(config, HEAD_KEYS): few}
    if kv_key := _key(config, KV_HEAD_KEYS):
        found[kv_key] = few_kv
    return found | _linear_heads(config)


def _linear_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the new numbers of heads of linear attention; they keep their ratio."""
    keys, values = (_first(config, (key,)) for key in _LINEAR_HEADS)
    if not keys or values % keys:
        return {}
    few = min(keys, 2)
    return dict(zip(_LINEAR_HEADS, (few, few * (values // keys)), strict=True))


def _shrunk(key: str, value: int, hidden: int, widths: Mapping[str, int]) -> int:
    if _VOCABULARY_KEYS.fullmatch(key):
        return min(value, _VOCABULARY)
    if _TOKEN_KEYS.fullmatch(key):
        return min(value, _VOCABULARY - 1)
    if _WINDOW_KEYS.fullmatch(key):
        return min(value, WINDOW_TOKENS)
    if _USED_KEYS.fullmatch(key):
        return min(value, _USED_EXPERTS)
    if _EXPERT_KEYS.fullmatch(key):
        return min(value, _EXPERTS)
    if _RANK_KEYS.fullmatch(key):
        return min(value, _RANK)
    if widths and _SIZE_KEYS.fullmatch(key) and value >= hidden and value % hidden == 0:
        new_hidden = next(iter(widths.values()))
        is_inner = bool(_INNER_KEYS.fullmatch(key)) and value != hidden
        return _INNER if is_inner else value // hidden * new_hidden
    if widths and _INNER_KEYS.fullmatch(key):
        return min(value, _INNER)
    return value


def _shrunk_list(key: str, value: list[Any], layers: int, few: int) -> list[Any]:
    if layers and len(value) == layers:
        return value[:few]
    if _TOKEN_KEYS.fullmatch(key):
        return [min(one, _VOCABULARY - 1) if type(one) is int else one for one in value]
    if _INDEX_KEYS.fullmatch(key) and all(type(one) is int and 0 <= one < layers for one in value):
        return [one for one in value if one < few]
    return value


def _is_index(key: object) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isdecimal())


def _layer_count(config: Mapping[str, Any]) -> int:
    """Return how many layers show every kind of layer."""
    layers = _first(config, LAYER_KEYS)
    wanted = _LEAST_LAYERS
    for key, value in config.items():
        if type(value) is int and _PERIOD_KEYS.fullmatch(key) and 0 < value < _MOST_LAYERS:
            wanted = max(wanted, value + 1)
        elif isinstance(value, list) and layers and len(value) == layers:
            wanted = max(wanted, _covering(value))
    return min(layers, wanted, _MOST_LAYERS)


def _covering(kinds: list[Any]) -> int:
    """Return the length of the shortest start of `kinds` that has each of them."""
    texts = [str(kind) for kind in kinds]
    return max(texts.index(kind) for kind in set(texts)) + 1


def _fit_layers(small: dict[str, Any], config: Mapping[str, Any], few: int) -> None:
    layers = _first(config, LAYER_KEYS)
    if not layers:
        return
    small[_key(config, LAYER_KEYS)] = few
    first_sliding = config.get("max_window_layers")
    if type(first_sliding) is int:
        small["max_window_layers"] = (
            few if first_sliding >= layers else first_sliding * few // layers
        )
    if type(config.get("first_k_dense_replace")) is int:
        small["first_k_dense_replace"] = min(config["first_k_dense_replace"], 1)


def _fit_groups(small: dict[str, Any]) -> None:
    """Keep experts a multiple of their groups."""
    groups = small.get("n_group")
    if type(groups) is int and groups > 1:
        small["n_group"] = 2
        small["topk_group"] = min(int(small.get("topk_group") or 1), 2)


def window_of(config: Mapping[str, Any]) -> int | None:
    """Return the smallest sliding window in tokens of a flattened configuration, None without."""
    found = [
        value
        for key, value in config.items()
        if _WINDOW_KEYS.fullmatch(key) and type(value) is int and value > 0
    ]
    return min(found, default=None)
