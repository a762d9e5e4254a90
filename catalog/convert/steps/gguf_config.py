"""Describes a GGUF model of Llama's family as Hugging Face does: config.json and tensor names.

transformers' own reader leaves out the rotary scaling, the width of heads and unknown settings, and
the converted model then answers with other text.  So every key and tensor is known, or refused.
Source: llama.cpp's `convert_hf_to_gguf.py` and `llama-model.cpp`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.header import GgufFile
from catalog.convert.steps.rotary import llama3_factors
from core.errors import BrokenModel, UnsupportedCapability

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
ROPE_FREQS = "rope_freqs.weight"
_NAME = re.compile(r"blk\.(\d+)\.(\w+)")
_QKV = ("attn_q", "attn_k", "attn_v")
_MAX_NUMBER = 2**31 - 1
# What a key after the architecture's name may say; other keys may change what is computed.
_KNOWN_KEYS = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
})  # fmt: skip
# These change nothing as long as they have this value.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,),
    "pooling_type": (0,), "attention.sliding_window": (0,), "logit_scale": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Architecture:
    """An architecture: its names in transformers, and how its tensors differ from Llama's."""

    model_type: str
    class_name: str
    is_permuted: bool = False
    has_qk_norms: bool = False
    has_qkv_bias: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)


ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("llama", "LlamaForCausalLM", is_permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", has_qkv_bias=True),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", has_qk_norms=True),
}


def hf_name(name: str) -> str | None:
    """Return a GGUF tensor's name in transformers; None for the rotary factors.

    The part after the last dot is kept.  Raises BrokenModel for tensors of other architectures.
    """
    if name == ROPE_FREQS:
        return None
    base, _, kind = name.rpartition(".")
    match = _NAME.fullmatch(base)
    layer = _LAYER | _NORMS
    if match and match[2] in layer:
        return f"model.layers.{match[1]}.{layer[match[2]]}.{kind}"
    if base in _TOP:
        return f"{_TOP[base]}.{kind}"
    raise BrokenModel(f"The tensor {name!r} is not part of this architecture.", param="model")


def unpermuted_heads(header: GgufFile, name: str) -> int:
    """Return the number of heads by which a tensor's rows are reordered in GGUF; 0 if not."""
    if not ARCHITECTURES[header.architecture].is_permuted:
        return 0
    part = name.rpartition(".")[0].rpartition(".")[2]
    heads = header.required(f"{header.architecture}.attention.head_count", _MAX_NUMBER)
    if part == "attn_q":
        return heads
    kv_heads = header.number(f"{header.architecture}.attention.head_count_kv", 1, _MAX_NUMBER)
    return (kv_heads or heads) if part == "attn_k" else 0


def unsupported_reason(header: GgufFile) -> str:
    """Return why the model cannot be described for transformers; empty if it can.

    Reads no tensors.
    """
    architecture = header.architecture
    if architecture not in ARCHITECTURES:
        return f"the conversion does not support the architecture {architecture[:60]!r}"
    for key, value in header.metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _KNOWN_KEYS or value in _NEUTRAL.get(name, ()):
            continue
        if name == "attention.sliding_window" and _is_beyond_context(header, value):
            continue
        return f"it has the setting {key[:100]}, which the conversion does not know"
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        counts = header.metadata.get(f"{architecture}.{name}")
        if isinstance(counts, tuple) and len(set(counts)) > 1:
            return f"its layers differ in {name}"
    kind = header.text(f"{architecture}.rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        return f"the RoPE scaling {kind[:50]!r} is not supported"
    return ""


def _is_beyond_context(header: GgufFile, window: object) -> bool:
    context = header.number(f"{header.architecture}.context_length", 0, _MAX_NUMBER)
    return isinstance(window, int) and context is not None and window >= context


def hf_config(
    header: GgufFile, shapes: Mapping[str, Sequence[int]], rope_freqs: NDArray[np.float32] | None
) -> dict[str, Any]:
    """Return the config.json of a model with tensors of these `shapes` (rows first).

    Raises BrokenModel for missing tensors and numbers, UnsupportedCapability.
    """
    if reason := unsupported_reason(header):
        raise _unsupported(reason)
    kind = ARCHITECTURES[header.architecture]
    layers = _number(header, "block_count")
    hidden, heads = _number(header, "embedding_length"), _number(header, "attention.head_count")
    width = _number(header, "attention.key_length", hidden // heads)
    if _number(header, "attention.value_length", width) != width:
        raise _unsupported("its keys and values have different widths")
    if _number(header, "rope.dimension_count", width) != width:
        raise _unsupported("it rotates only a part of each head")
    biases = _biases(kind, shapes)
    _check_complete(kind, shapes, layers)
    config: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "hidden_size": hidden,
        "intermediate_size": _number(header, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _number(header, "attention.head_count_kv", heads),
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": _number(header, "context_length"),
        "rms_norm_eps": _real(header, "attention.layer_norm_rms_epsilon", 1e-6),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        **biases,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = header.number(f"tokenizer.ggml.{key}_token_id", 0, _MAX_NUMBER)
    if kind.model_type == "qwen2":
        config["use_sliding_window"] = False
    return config | _rotary(header, width, rope_freqs)


def _unsupported(reason: str) -> UnsupportedCapability:
    return UnsupportedCapability(
        f"The GGUF file cannot be converted: {reason}.", param="target_format"
    )


def _number(header: GgufFile, name: str, default: int | None = None) -> int:
    key = f"{header.architecture}.{name}"
    if default is None:
        return header.required(key, _MAX_NUMBER)
    value = header.number(key, 1, _MAX_NUMBER)
    return default if value is None else value


def _real(header: GgufFile, name: str, default: float) -> float:
    value = header.metadata.get(f"{header.architecture}.{name}", default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise BrokenModel(
            f"The GGUF file's {header.architecture}.{name} is not a positive number.",
            param="model",
        )
    # Stored as float32: its shortest decimal is what the model was trained with.
    return float(str(np.float32(value)))


def _biases(kind: _Architecture, shapes: Mapping[str, object]) -> dict[str, bool]:
    """Return the settings that say which layers have a bias.  Raises UnsupportedCapability."""
    found = {part: f"blk.0.{part}.bias" in shapes for part in _LAYER}
    has_qkv = {found[part] for part in _QKV}
    has_mlp = {found[part] for part in ("ffn_gate", "ffn_up", "ffn_down")}
    if len(has_qkv) > 1 or len(has_mlp) > 1:
        raise _unsupported("only some of its projections have a bias")
    (qkv,), (mlp,) = has_qkv, has_mlp
    if kind.has_qkv_bias:
        if not qkv or found["attn_output"] or mlp:
            raise _unsupported("its biases are not those of the architecture")
        return {}
    if qkv != found["attn_output"]:
        raise _unsupported("only some of its projections have a bias")
    if kind.has_qk_norms:
        if mlp:
            raise _unsupported("its biases are not those of the architecture")
        return {"attention_bias": qkv}
    return {"attention_bias": qkv, "mlp_bias": mlp}


def _check_complete(kind: _Architecture, shapes: Mapping[str, object], layers: int) -> None:
    """Check that every layer has the weights of the first.  Raises BrokenModel."""
    parts = [*_LAYER, *(_NORMS if kind.has_qk_norms else ())]
    needed = [f"{name}.weight" for name in ("token_embd", "output_norm")]
    for layer in range(layers):
        needed += [f"blk.{layer}.{part}.weight" for part in parts]
        needed += [f"blk.{layer}.{part}.bias" for part in _LAYER if f"blk.0.{part}.bias" in shapes]
    missing = next((name for name in needed if name not in shapes), None)
    if missing is not None:
        raise BrokenModel(f"The GGUF file has no tensor {missing}.", param="model")
    known = {*needed, "output.weight", ROPE_FREQS}
    unknown = next((name for name in shapes if name not in known), None)
    if unknown is not None:
        raise _unsupported(f"it has the tensor {unknown[:100]!r}")


def _rotary(header: GgufFile, width: int, rope_freqs: NDArray[np.float32] | None) -> dict[str, Any]:
    """Return the rotary settings in transformers' older and newer form."""
    theta = _real(header, "rope.freq_base", 10_000.0)
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope_freqs is not None:
        scaling = _llama3(header, theta, width, rope_freqs)
    elif header.text(f"{header.architecture}.rope.scaling.type") == "linear":
        scaling = {"rope_type": "linear", "factor": _real(header, "rope.scaling.factor", 1.0)}
    elif "rope.scale_linear" in {key.partition(".")[2] for key in header.metadata}:
        scaling = {"rope_type": "linear", "factor": _real(header, "rope.scale_linear", 1.0)}
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": theta, **scaling},
    }


def _llama3(
    header: GgufFile, theta: float, width: int, factors: NDArray[np.float32]
) -> dict[str, Any]:
    """Return the scaling that gives the file's rotary factors.  Raises UnsupportedCapability."""
    stated = header.number(
        f"{header.architecture}.rope.scaling.original_context_length", 0, _MAX_NUMBER
    )
    trained = [8192, *(1 << power for power in range(8, 19))]
    for original in [stated, *trained] if stated else trained:
        scaling = {
            "rope_type": "llama3",
            "factor": float(str(np.float32(factors.max()))),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = llama3_factors(scaling, theta, width)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4):
            return scaling
    raise _unsupported("its rotary factors (rope_freqs) are of no known kind")
