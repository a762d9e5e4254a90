"""A GGUF header becomes the configuration that gives the same text, or is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.gguf.header import GgufFile
from catalog.convert.steps.gguf_config import hf_config, hf_name, unsupported_reason
from catalog.convert.steps.rotary import llama3_factors
from core.errors import BrokenModel, UnsupportedCapability

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def header(architecture: str = "llama", **more: Any) -> GgufFile:
    shape = {
        "context_length": 4096,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "rope.freq_base": 500_000.0,
    } | {key.replace("__", "."): value for key, value in more.items()}
    metadata = {f"{architecture}.{key}": value for key, value in shape.items()}
    metadata |= {"general.architecture": architecture, "tokenizer.ggml.eos_token_id": 2}
    return GgufFile(Path("m.gguf"), 0, {k: v for k, v in metadata.items() if v is not None}, {})


def shapes(architecture: str = "llama", *extra: str) -> dict[str, tuple[int, ...]]:
    parts = ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
             "ffn_up", "ffn_down"]  # fmt: skip
    names = [f"{part}.weight" for part in parts]
    if architecture == "qwen2":
        names += [f"{part}.bias" for part in ("attn_q", "attn_k", "attn_v")]
    if architecture == "qwen3":
        names += ["attn_q_norm.weight", "attn_k_norm.weight"]
    listed = [f"blk.{layer}.{name}" for layer in range(2) for name in names]
    listed += ["token_embd.weight", "output_norm.weight", *extra]
    return dict.fromkeys(listed, (320, 64))


def test_every_number_is_carried_over() -> None:
    config = hf_config(header(attention__key_length=32, attention__value_length=32), shapes(), None)
    expected = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "vocab_size": 320, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 500_000.0, "rope_scaling": None,
        "eos_token_id": 2, "bos_token_id": None,
    }  # fmt: skip
    assert config.items() >= expected.items()
    assert config["rope_parameters"] == {"rope_theta": 500_000.0, "rope_type": "default"}


def test_what_the_tensors_tell_is_in_the_configuration() -> None:
    assert (
        hf_config(header(), shapes("llama", "output.weight"), None)["tie_word_embeddings"] is False
    )
    biases = [
        f"blk.{layer}.attn_{part}.bias" for layer in range(2) for part in ("q", "k", "v", "output")
    ]
    assert hf_config(header(), shapes("llama", *biases), None)["attention_bias"] is True
    assert "attention_bias" not in hf_config(header("qwen2"), shapes("qwen2"), None)
    assert hf_config(header("qwen3"), shapes("qwen3"), None)["model_type"] == "qwen3"


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("original", [8192, 4096])
def test_the_rotary_factors_of_llama_3_are_recognised(factor: float, original: int) -> None:
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": original}
    factors = llama3_factors(scaling, 500_000.0, 16)
    config = hf_config(header(), shapes("llama", "rope_freqs.weight"), factors)
    assert llama3_factors(config["rope_scaling"], 500_000.0, 16) == pytest.approx(factors)
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == factor


def test_linear_scaling_is_carried_over() -> None:
    for keys in ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
                 {"rope__scale_linear": 4.0}):  # fmt: skip
        config = hf_config(header(**keys), shapes(), None)
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def other_factors() -> NDArray[np.float32]:
    return np.linspace(1, 3, 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rope__scaling__type": "yarn"}, "yarn"),
        ({"expert_count": 8}, "expert_count"),
        ({"attention__sliding_window": 512}, "sliding_window"),
        ({"embedding_scale": 12.0}, "embedding_scale"),
        ({"feed_forward_length": (128, 64)}, "feed_forward_length"),
        ({"rope__dimension_count": 8}, "a part of each head"),
        ({"attention__value_length": 8}, "different widths"),
    ],
)
def test_what_cannot_be_described_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedCapability, match=reason):
        hf_config(header(**more), shapes(), None)


def test_settings_that_change_nothing_are_accepted() -> None:
    neutral = header(expert_count=0, attention__sliding_window=4096, vocab_size=320)
    assert unsupported_reason(neutral) == ""


@pytest.mark.parametrize(
    ("architecture", "extra", "reason"),
    [
        ("llama", ("blk.0.attn_q.bias",), "some of its projections"),
        ("llama", ("blk.0.ffn_gate_inp.weight",), "ffn_gate_inp"),
        ("llama", ("blk.2.attn_q.weight",), "blk.2"),
        ("qwen2", ("blk.0.attn_output.bias",), "biases"),
        ("llama", ("blk.0.attn_sinks.weight",), "attn_sinks"),
    ],
)
def test_unknown_tensors_are_refused(
    architecture: str, extra: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UnsupportedCapability, match=reason):
        hf_config(header(architecture), shapes(architecture, *extra), None)


def test_unknown_rotary_factors_are_refused() -> None:
    with pytest.raises(UnsupportedCapability, match="rope_freqs"):
        hf_config(header(), shapes("llama", "rope_freqs.weight"), other_factors())


def test_missing_tensors_are_named() -> None:
    some = shapes()
    del some["blk.1.ffn_up.weight"]
    with pytest.raises(BrokenModel, match=r"blk\.1\.ffn_up\.weight"):
        hf_config(header(), some, None)


def test_other_architectures_are_refused_by_name() -> None:
    assert "phi3" in unsupported_reason(header("phi3"))
    with pytest.raises(BrokenModel, match="attn_qkv"):
        hf_name("blk.0.attn_qkv.weight")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "x"])
def test_impossible_numbers_are_refused(value: Any) -> None:
    with pytest.raises(BrokenModel, match="freq_base"):
        hf_config(header(rope__freq_base=value), shapes(), None)
