"""A small Llama with fixed random weights, and its logits in float32 computed with NumPy alone.

What MLX and PyTorch compute is compared with it; transformers and mlx-lm read the same names.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_LAYERS, _WIDTH, _HEADS, _PAIRS, _HEAD, _INNER, _VOCABULARY = 4, 256, 8, 4, 32, 512, 1024
_BASE, _EPSILON = 10_000.0, 1e-5
CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "llama",
        "num_hidden_layers": _LAYERS,
        "hidden_size": _WIDTH,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _PAIRS,
        "head_dim": _HEAD,
        "intermediate_size": _INNER,
        "vocab_size": _VOCABULARY,
        "rope_theta": _BASE,
        "rms_norm_eps": _EPSILON,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
)


def prompts(streams: int, length: int) -> NDArray[np.int64]:
    """Return fixed tokens that differ in each stream: (streams, length)."""
    indices = np.arange(length)[None, :] * 37 + np.arange(streams)[:, None] * 101
    tokens: NDArray[np.int64] = (indices + 11) % _VOCABULARY
    return tokens


def make_weights() -> dict[str, Array]:
    """Return the weights by their names in Hugging Face's files, exact in float16 too."""
    source = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Array:
        values = source.standard_normal((rows, columns)) / np.sqrt(columns)
        exact: Array = values.astype(np.float16).astype(np.float32)
        return exact

    ones = np.ones(_WIDTH, np.float32)
    weights = {
        "model.embed_tokens.weight": matrix(_VOCABULARY, _WIDTH) * 16,
        "model.norm.weight": ones,
        "lm_head.weight": matrix(_VOCABULARY, _WIDTH),
    }
    for layer in range(_LAYERS):
        start = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", _HEADS * _HEAD, _WIDTH),
            ("self_attn.k_proj", _PAIRS * _HEAD, _WIDTH),
            ("self_attn.v_proj", _PAIRS * _HEAD, _WIDTH),
            ("self_attn.o_proj", _WIDTH, _HEADS * _HEAD),
            ("mlp.gate_proj", _INNER, _WIDTH),
            ("mlp.up_proj", _INNER, _WIDTH),
            ("mlp.down_proj", _WIDTH, _INNER),
        ):
            weights[f"{start}.{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{start}.{name}.weight"] = ones
    return weights


def last_logits(weights: Mapping[str, Array], tokens: NDArray[np.int64]) -> Array:
    """Return the logits after the last token of each row of `tokens`: (rows, vocabulary)."""
    return np.stack([_logits(weights, row) for row in tokens])


def _logits(weights: Mapping[str, Array], tokens: NDArray[np.int64]) -> Array:
    x: Array = weights["model.embed_tokens.weight"][tokens]
    for layer in range(_LAYERS):
        start = f"model.layers.{layer}"
        x = x + _attention(weights, f"{start}.self_attn", _normed(x))
        h = _normed(x)
        gate = h @ weights[f"{start}.mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ weights[f"{start}.mlp.up_proj.weight"].T)
        x = x + inner @ weights[f"{start}.mlp.down_proj.weight"].T
    last: Array = (_normed(x[-1:]) @ weights["lm_head.weight"].T)[0]
    return last


def _attention(weights: Mapping[str, Array], start: str, h: Array) -> Array:
    """Return causal attention with the weights below `start`; `h` is (tokens, width)."""
    q = _turned(_heads(h @ weights[f"{start}.q_proj.weight"].T))
    k = _turned(_heads(h @ weights[f"{start}.k_proj.weight"].T))
    v = _heads(h @ weights[f"{start}.v_proj.weight"].T)
    k, v = (np.repeat(each, _HEADS // _PAIRS, axis=0) for each in (k, v))
    scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(_HEAD))
    scores += np.triu(np.full(scores.shape[1:], -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
    joined: Array = mixed.transpose(1, 0, 2).reshape(len(h), -1)
    return joined @ weights[f"{start}.o_proj.weight"].T


def _heads(x: Array) -> Array:
    """Return (heads, tokens, head) of (tokens, heads * head)."""
    return x.reshape(len(x), -1, _HEAD).transpose(1, 0, 2)


def _normed(x: Array) -> Array:
    """Return `x` over its root mean square; all of this model's norms have the weight one."""
    scale: Array = np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(_EPSILON))
    return x / scale


def _turned(x: Array) -> Array:
    """Return `x`, (heads, tokens, head), with rotary positions, halves as pairs."""
    half = _HEAD // 2
    angles = np.arange(x.shape[1])[:, None] / _BASE ** (np.arange(half)[None, :] / half)
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cosine - b * sine, b * cosine + a * sine), axis=-1)
