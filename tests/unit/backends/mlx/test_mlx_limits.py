"""Settings that mlx-lm's source does not mention are found without importing it."""

from typing import Any

import pytest

from backends.mlx.limits import unread_setting

LENGTH = {"max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("model_type", "config", "found"),
    [
        ("gemma2", {"sliding_window": 4096}, "sliding_window"),
        ("phi3", {"sliding_window": 2047}, "sliding_window"),
        ("glm", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("llama", {"rope_scaling": {"rope_type": "nobody", "factor": 2.0}}, "nobody"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ("llama", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    ],
)
def test_a_setting_that_the_code_ignores_is_named(
    model_type: str, config: dict[str, Any], found: str
) -> None:
    assert found in unread_setting(model_type, {**LENGTH, **config})


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("gemma2", {"sliding_window": 8192}),
        ("gemma2", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}),
        ("glm", {"partial_rotary_factor": 1.0}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("llama", {"rope_scaling": {"type": "default"}}),
        ("llama", {"hidden_act": "silu"}),
        ("mixtral", {"hidden_act": "silu"}),
        ("gpt2", {"hidden_act": "gelu_new"}),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}),
    ],
)
def test_what_the_code_reads_or_does_not_need_is_no_limit(
    model_type: str, config: dict[str, Any]
) -> None:
    assert unread_setting(model_type, {**LENGTH, **config}) == ""


@pytest.mark.parametrize("model_type", ["", "../../etc", "x" * 100, "nonesuch"])
def test_a_type_without_code_has_no_source(model_type: str) -> None:
    assert isinstance(unread_setting(model_type, LENGTH), str)
