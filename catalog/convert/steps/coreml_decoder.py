"""Builds the Llama-family decoder that is traced for Core ML, with its KV cache as buffers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from backends.hf.folder import HfFolder, weight_files
from catalog.convert.steps.rotary import attention_window
from core.errors import BrokenModel, RequestError

Tensors: TypeAlias = dict[str, Any]

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_MAX_CONTEXT = 1 << 17
_LAYER = "model.layers.{}."
_MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decoder:
    """The shape of a Llama-like decoder; `rotary[i]` says whether layer i uses RoPE."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    epsilon: float
    frequencies: tuple[float, ...]
    rotary: tuple[bool, ...]


def decoder_of(folder: HfFolder, context_tokens: int) -> Decoder:
    """Return the decoder's shape.  Raises RequestError for unsupported models."""
    config = folder.config
    kind = str(config.get("model_type", ""))
    if kind not in FAMILY:
        raise _unsupported(f"the model type {kind[:50]!r}; supported are {', '.join(FAMILY)}")
    if config.get("hidden_act", "silu") != "silu":
        raise _unsupported(f"the activation {str(config['hidden_act'])[:50]!r}")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported("partial rotary embeddings")
    longest = longest_context(folder)
    if not 1 <= context_tokens <= longest:
        raise RequestError(
            f"context_tokens is {context_tokens}; for this model it must be from 1 to {longest}.",
            param="context_tokens",
        )
    heads = _positive_int(config, "num_attention_heads")
    size = _positive_int(config, "head_dim", _positive_int(config, "hidden_size") // heads)
    layers = _positive_int(config, "num_hidden_layers")
    return Decoder(
        layers=layers,
        heads=heads,
        kv_heads=_positive_int(config, "num_key_value_heads", heads),
        head_size=size,
        context=context_tokens,
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        frequencies=_frequencies(config, size),
        rotary=_rotary_layers(config, layers),
    )


def longest_context(folder: HfFolder) -> int:
    """Return the longest context in tokens: the graph attends to all of it, without a window."""
    config = folder.config
    longest = min(_positive_int(config, "max_position_embeddings", 2048), _MAX_CONTEXT)
    return min(longest, attention_window(config) or longest)


def _rotary_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return which layers have rotary positions (Source: transformers, SmolLM3Config)."""
    if config.get("model_type") != "smollm3":
        return (True,) * layers
    listed = config.get("no_rope_layers")
    if isinstance(listed, list) and len(listed) == layers:
        return tuple(map(bool, listed))
    interval = _positive_int(config, "no_rope_layer_interval", 4)
    return tuple((index + 1) % interval != 0 for index in range(layers))


def _unsupported(what: str) -> RequestError:
    return RequestError(f"The Core ML conversion does not support {what}.", param="model")


def _positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= 2**24:
        raise BrokenModel(f"config.json has no valid {key} (a positive integer).", param="model")
    return value


def _frequencies(config: Mapping[str, Any], size: int) -> tuple[float, ...]:
    """Return the RoPE frequency of each pair of a head's dimensions, in radians per position.

    Source: transformers, modeling_rope_utils (default, linear, llama3).
    """
    theta = float(config.get("rope_theta") or 10_000.0)
    plain = [theta ** (-2 * index / size) for index in range(size // 2)]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(each / float(scaling["factor"]) for each in plain)
    if kind != "llama3":
        raise _unsupported(f"the RoPE scaling {str(kind)[:50]!r}")
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    trained = float(scaling["original_max_position_embeddings"])
    scaled = []
    for each in plain:
        turns = trained * each / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(each * (share + (1 - share) / factor))
    return tuple(scaled)


def read_weights(source: Path, decoder: Decoder) -> Tensors:
    """Return the tensors as float32.  Raises RequestError for unknown tensors."""
    from safetensors import safe_open

    weights: Tensors = {}
    for path in weight_files(source, "safetensors"):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight"))
    needed = {"model.embed_tokens.weight", "model.norm.weight"}
    optional = {"lm_head.weight"}
    for index in range(decoder.layers):
        start = _LAYER.format(index)
        needed |= {f"{start}{name}.weight" for name in _MATRICES}
        needed |= {f"{start}{n}layernorm.weight" for n in ("input_", "post_attention_")}
        optional |= {f"{start}{name}.bias" for name in _MATRICES}
        optional |= {f"{start}self_attn.{name}_norm.weight" for name in "qk"}
        weights.pop(f"{start}self_attn.rotary_emb.inv_freq", None)
    if missing := sorted(needed - weights.keys()):
        raise BrokenModel(f"The weights lack the tensor {missing[0]}.", param="model")
    if unknown := sorted(weights.keys() - needed - optional):
        raise _unsupported(f"the tensor {unknown[0][:100]!r}")
    return weights


def build_module(decoder: Decoder, weights: Tensors) -> Any:
    """Return a traceable module; its two cache buffers become Core ML states."""
    import torch

    positions = torch.arange(decoder.context).float()
    angles = torch.outer(positions, torch.tensor(decoder.frequencies))
    angles = torch.cat((angles, angles), -1)
    shape = (decoder.layers, 1, decoder.kv_heads, decoder.context, decoder.head_size)

    class Module(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in weights.items():
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name.replace(".", "_"), parameter)
            self.register_buffer("cosines", angles.cos())
            self.register_buffer("sines", angles.sin())
            self.register_buffer("keyCache", torch.zeros(shape))
            self.register_buffer("valueCache", torch.zeros(shape))

        def weight(self, name: str) -> Any:
            return getattr(self, name.replace(".", "_"), None)

        def forward(self, inputIds: Any, causalMask: Any) -> Any:
            return _forward(self, decoder, inputIds, causalMask)

    return Module().eval()


def _forward(module: Any, decoder: Decoder, token_ids: Any, mask: Any) -> Any:
    """Return logits (1, q, vocabulary) of tokens (1, q); `mask` is additive (1, 1, q, total)."""
    from torch.nn import functional

    end = mask.shape[-1]
    past = end - token_ids.shape[-1]
    rotation = (module.cosines[past:end][None, None], module.sines[past:end][None, None])
    x = functional.embedding(token_ids, module.weight("model.embed_tokens.weight"))
    for index in range(decoder.layers):
        x = _layer(module, decoder, index, x, mask, rotation)
    x = _rms_norm(x, module.weight("model.norm.weight"), decoder.epsilon)
    return functional.linear(x, module.weight("lm_head.weight"))


def _layer(module: Any, decoder: Decoder, index: int, x: Any, mask: Any, rotation: Any) -> Any:
    from torch.nn import functional

    start = _LAYER.format(index)

    def linear(name: str, value: Any) -> Any:
        weight, bias = module.weight(f"{start}{name}.weight"), module.weight(f"{start}{name}.bias")
        return functional.linear(value, weight, bias)

    def heads(name: str, value: Any, count: int) -> Any:
        value = linear(f"self_attn.{name}_proj", value)
        value = value.view(1, -1, count, decoder.head_size).transpose(1, 2)
        norm = module.weight(f"{start}self_attn.{name}_norm.weight")
        value = value if norm is None else _rms_norm(value, norm, decoder.epsilon)
        return _rotated(value, *rotation) if decoder.rotary[index] and name in "qk" else value

    hidden = _rms_norm(x, module.weight(f"{start}input_layernorm.weight"), decoder.epsilon)
    query = heads("q", hidden, decoder.heads)
    groups = decoder.heads // decoder.kv_heads
    end = mask.shape[-1]
    past = end - x.shape[1]
    cached = []
    for name, cache in (("k", module.keyCache), ("v", module.valueCache)):
        new = heads(name, hidden, decoder.kv_heads)
        cache[index : index + 1, :, :, past:end, :] = new.unsqueeze(0)
        cached.append(cache[index, :, :, :end, :].repeat_interleave(groups, 1))
    attended = functional.scaled_dot_product_attention(query, cached[0], cached[1], mask)
    width = decoder.heads * decoder.head_size
    x = x + linear("self_attn.o_proj", attended.transpose(1, 2).reshape(1, -1, width))
    hidden = _rms_norm(x, module.weight(f"{start}post_attention_layernorm.weight"), decoder.epsilon)
    gate = functional.silu(linear("mlp.gate_proj", hidden))
    return x + linear("mlp.down_proj", gate * linear("mlp.up_proj", hidden))


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def _rotated(x: Any, cosines: Any, sines: Any) -> Any:
    import torch

    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines
