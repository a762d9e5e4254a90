"""Configurations scaled down for a comparison: small, and computing as the real ones do."""

from typing import Any

import pytest

from backends.hf.shrink import WINDOW_TOKENS, shrink, window_of

LARGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128009],
    "pad_token_id": 128004,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
}


def test_widths_of_heads_and_the_sharing_of_keys_stay() -> None:
    small = shrink(LARGE)
    assert small["hidden_size"] // small["num_attention_heads"] == 4096 // 32
    assert small["num_attention_heads"] > small["num_key_value_heads"]
    assert small["rope_scaling"] == LARGE["rope_scaling"]
    assert small["max_position_embeddings"] == 131072


def test_sizes_and_the_ids_of_tokens_fit_the_small_vocabulary() -> None:
    small = shrink(LARGE)
    assert small["hidden_size"] * small["intermediate_size"] * small["num_hidden_layers"] < 2**20
    assert all(
        token < small["vocab_size"] for token in (*small["eos_token_id"], small["pad_token_id"])
    )


def test_a_small_model_keeps_its_sizes() -> None:
    config = {**LARGE, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    small = shrink(config)
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        assert small[key] == config[key]


def test_every_kind_of_layer_is_kept() -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 4
    small = shrink({**LARGE, "num_hidden_layers": 24, "layer_types": kinds})
    assert small["layer_types"] == kinds[: small["num_hidden_layers"]]
    assert set(small["layer_types"]) == set(kinds)


@pytest.mark.parametrize("key", ["full_attention_interval", "sliding_window_pattern"])
def test_a_period_of_layers_is_seen_whole(key: str) -> None:
    assert shrink({**LARGE, key: 6})["num_hidden_layers"] > 6


def test_windows_are_shorter_than_the_prompt() -> None:
    small = shrink(
        {**LARGE, "sliding_window": 4096, "text_config": {"attention_window_size": 2048}}
    )
    assert small["sliding_window"] == WINDOW_TOKENS
    assert shrink({"sliding_window": 4})["sliding_window"] == 4
    assert shrink({"sliding_window": None}) == {"sliding_window": None}


def test_heads_of_linear_attention_keep_their_ratio() -> None:
    small = shrink({**LARGE, "linear_num_key_heads": 16, "linear_num_value_heads": 48})
    assert (small["linear_num_key_heads"], small["linear_num_value_heads"]) == (2, 6)


def test_settings_by_the_number_of_a_layer_are_those_of_the_layers_left() -> None:
    small = shrink({**LARGE, "per_layer_config": {"1": {"a": 1}, "30": {"a": 2}}})
    assert small["per_layer_config"] == {"1": {"a": 1}}


def test_experts_are_few_and_fit_their_groups() -> None:
    config = {
        **LARGE, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536,
    }  # fmt: skip
    small = shrink(config)
    assert small["n_routed_experts"] % small["n_group"] == 0
    assert small["num_experts_per_tok"] <= small["n_routed_experts"] // 2
    assert small["first_k_dense_replace"] < small["num_hidden_layers"]
    assert small["kv_lora_rank"] <= 64 >= small["q_lora_rank"]


def test_a_nested_configuration_shrinks_and_quantization_is_dropped() -> None:
    small = shrink({"model_type": "m", "text_config": LARGE, "quantization_config": {"bits": 4}})
    assert small["text_config"] == shrink(LARGE)
    assert "quantization_config" not in small


def test_the_real_configuration_is_not_changed() -> None:
    before = repr(LARGE)
    shrink(LARGE)
    assert repr(LARGE) == before


def test_the_window_is_the_shortest_that_is_set() -> None:
    assert window_of({"sliding_window": 4096, "attention_chunk_size": 8192}) == 4096
    assert window_of({"sliding_window": None, "sliding_window_pattern": 6}) is None
