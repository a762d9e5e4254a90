"""Converts GGUF to MLX with the quantized blocks unchanged, without loss of precision."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from backends.gguf.header import read_gguf
from catalog.convert.graph import MLX_BLOCKS
from catalog.convert.job import Job, Report, write_json
from catalog.convert.steps.from_gguf import finish_config, single_file, write_tokenizer
from core.errors import BrokenModel, UnsupportedCapability

# MLX's own group size for GGUF blocks (Source: mlx/io/gguf_quants.cpp).
_GROUP = 32
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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED = frozenset({"rope_freqs"})
_NAME = re.compile(r"blk\.(\d+)\.(\w+)")


def gguf_to_mlx(job: Job, report: Report) -> None:
    """Write an MLX folder whose weights are exactly equal to the GGUF file's.

    Scales are stored in f32, which represents f16 without loss.  Raises BrokenModel,
    UnsupportedCapability.
    """
    import mlx.core as mx
    from transformers import AutoConfig, GenerationConfig

    report(0.0, "reading the tokenizer")
    source = single_file(job)
    header = read_gguf(source)
    types = set(header.elements_by_type) - MLX_BLOCKS
    if types:
        raise UnsupportedCapability(
            f"MLX does not support the tensor types {', '.join(sorted(types))}; "
            "choose a number of bits instead of original.",
            param="quantization",
        )
    write_tokenizer(source, job.output)
    report(0.5, "reading the weights")
    described = AutoConfig.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
    )
    described.save_pretrained(job.output)
    GenerationConfig.from_model_config(described).save_pretrained(job.output)
    loaded: Any = mx.load(str(source), format="gguf")
    heads = {"attn_q": described.num_attention_heads, "attn_k": described.num_key_value_heads}
    weights: dict[str, Any] = {}
    for key, value in loaded.items():
        name = _mlx_name(key)
        if name is None:
            continue
        part = key.rsplit(".", 1)[0].rpartition(".")[2]
        if header.architecture == "llama" and part in heads:
            value = _unpermuted(value, heads[part])
        weights[name] = value if value.dtype == mx.uint32 else value.astype(mx.float32)
    report(0.7, "writing the weights")
    mx.save_safetensors(str(job.output / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = finish_config(job.output, "float32")
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    quantization = _quantization(weights)
    if quantization:
        config["quantization"] = config["quantization_config"] = quantization
    write_json(job.output / "config.json", config)
    report(1.0, "done")


def _mlx_name(key: str) -> str | None:
    """Return the tensor's name in MLX; None if MLX computes it itself.  Raises BrokenModel."""
    base, _, kind = key.rpartition(".")
    match = _NAME.fullmatch(base)
    if base in _IGNORED:
        return None
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{kind}"
    if base in _TOP:
        return f"{_TOP[base]}.{kind}"
    raise BrokenModel(f"The tensor {key!r} is not part of this architecture.", param="model")


def _unpermuted(rows: Any, heads: int) -> Any:
    """Undo GGUF's reordering of the rows of llama's q and k; shape (rows, …)."""
    shape = rows.shape
    if heads < 1 or shape[0] % (2 * heads):
        raise BrokenModel(f"{shape[0]} rows cannot be split into {heads} heads.", param="model")
    halves = rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def _quantization(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return mlx-lm's `quantization`: the most common bits, and each layer that differs."""
    bits: dict[str, int] = {}
    for name, value in weights.items():
        if name.endswith(".scales"):
            layer = name.removesuffix(".scales")
            packed = weights[f"{layer}.weight"].shape[-1] * 32
            bits[layer] = packed // (value.shape[-1] * _GROUP)
    if not bits:
        return {}
    common = Counter(bits.values()).most_common(1)[0][0]
    others = {
        layer: {"group_size": _GROUP, "bits": count}
        for layer, count in bits.items()
        if count != common
    }
    return {"group_size": _GROUP, "bits": common, "mode": "affine"} | others
