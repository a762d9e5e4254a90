"""What the zoo's architectures are described with: classes of transformers, tiny sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

# The window of models with sliding attention; three of the four prompts are longer or end beyond.
WINDOW = 48
CONTEXT = 2048

COMMON: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
LLAMA: Mapping[str, Any] = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
GPT2: Mapping[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
BART: Mapping[str, Any] = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
BERT: Mapping[str, Any] = {**COMMON, "intermediate_size": 128, "is_decoder": True}
EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
LOCAL_EXPERTS: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DELTA: Mapping[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
MAMBA2: Mapping[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model of the zoo.

    `config` and `model` are classes of transformers, `settings` the configuration's arguments.
    `variant` says what differs from the other models of the same type.
    `spare_vocabulary` rows of the output have no token, as where a vocabulary is padded.
    Models that are not `is_language_model` have no answers: they are to be refused.
    """

    name: str
    config: str
    model: str
    settings: Mapping[str, Any]
    variant: str = ""
    spare_vocabulary: int = 0
    is_language_model: bool = True


def architecture(
    name: str,
    family: str,
    base: Mapping[str, Any] = LLAMA,
    *,
    model: str = "",
    config: str = "",
    variant: str = "",
    spare_vocabulary: int = 0,
    **settings: Any,
) -> Architecture:
    """Return an architecture; `family` is the part that the names of its classes share."""
    return Architecture(
        name,
        config or f"{family}Config",
        model or f"{family}ForCausalLM",
        MappingProxyType({**base, **settings}),
        variant,
        spare_vocabulary,
    )


def other_model(name: str, family: str, model: str, **settings: Any) -> Architecture:
    """Return a model that no runtime here generates text with."""
    return Architecture(
        name, f"{family}Config", model, MappingProxyType(settings), is_language_model=False
    )
