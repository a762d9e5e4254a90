"""What the Core ML conversion accepts, and the positions it computes."""

from pathlib import Path
from typing import Any

import pytest

from backends.hf.folder import HfFolder
from catalog.convert.steps.coreml_decoder import decoder_of
from catalog.convert.steps.to_coreml import convert_to_coreml
from core.errors import BrokenModel, RequestError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
}


def folder(**changes: Any) -> HfFolder:
    return HfFolder(Path("model"), {**CONFIG, **changes}, {}, {}, None, "")


def test_decoder_has_the_shape_of_the_configuration() -> None:
    decoder = decoder_of(folder(), 128)
    assert (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_size) == (4, 4, 2, 16)
    assert decoder.frequencies[:2] == (1.0, 10_000.0 ** (-1 / 8))
    assert decoder.rotary == (True,) * 4
    some = decoder_of(folder(model_type="smollm3", no_rope_layers=[1, 1, 1, 0]), 128)
    assert some.rotary == (True, True, True, False)


def test_llama3_scaling_is_that_of_transformers() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    config = LlamaConfig(**CONFIG, rope_parameters={**scaling, "rope_theta": 10_000.0})
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = decoder_of(folder(rope_scaling=scaling), 128).frequencies
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"max_position_embeddings": 64}, "from 1 to 64"),
        ({"sliding_window": 100}, "from 1 to 100"),
    ],
)
def test_decoder_refuses_what_it_would_compute_wrongly(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RequestError, match=problem):
        decoder_of(folder(**changes), 128)


@pytest.mark.parametrize("value", [0, -1, "4", None, 2**40])
def test_decoder_refuses_impossible_numbers(value: object) -> None:
    with pytest.raises(BrokenModel, match="num_attention_heads"):
        decoder_of(folder(num_attention_heads=value), 128)


def test_conversion_writes_over_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="already exists"):
        convert_to_coreml(
            tmp_path, tmp_path, precision="f32", context_tokens=8, progress=lambda *_: None
        )
