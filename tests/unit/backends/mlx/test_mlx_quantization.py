"""MLX's quantization settings: defaults, layers of their own, and what contradicts the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.hf.header import TensorEntry
from backends.mlx.quantization import MlxWeights, mlx_settings, mlx_weights
from core.errors import BrokenModel

CONFIG = Path("/models/x/config.json")


def entry(dtype: str, *shape: int) -> TensorEntry:
    return TensorEntry(dtype, shape, 0)


def packed(
    base: str, bits: int, group: int, *, mode: str = "affine", columns: int = 256
) -> dict[str, TensorEntry]:
    """Return the tensors of 16 rows of `columns` weights."""
    found = {f"{base}.weight": entry("U32", 16, columns * bits // 32)}
    dtype = "BF16" if mode == "affine" else "U8"
    found[f"{base}.scales"] = entry(dtype, 16, columns // group)
    if mode == "affine":
        found[f"{base}.biases"] = entry(dtype, 16, columns // group)
    return found


def weights(settings: Any, tensors: Mapping[str, TensorEntry], **config: Any) -> MlxWeights:
    config = {"hidden_size": 256, **config}
    return mlx_weights(CONFIG, {"quantization": settings, **config}, tensors)


@pytest.mark.parametrize(
    ("settings", "bits", "group", "mode", "label"),
    [
        ({"bits": 4, "group_size": 64}, 4, 64, "affine", "4bit"),
        ({"bits": None, "group_size": None}, 4, 64, "affine", "4bit"),
        ({"mode": "affine", "bits": 8, "group_size": None}, 8, 64, "affine", "8bit"),
        ({"group_size": 32, "bits": 3}, 3, 32, "affine", "3bit"),
        ({"group_size": 128, "bits": 6, "mode": None}, 6, 128, "affine", "6bit"),
        ({}, 4, 64, "affine", "4bit"),
        ({"mode": "mxfp4"}, 4, 32, "mxfp4", "mxfp4"),
        ({"mode": "mxfp4", "bits": None, "group_size": None}, 4, 32, "mxfp4", "mxfp4"),
        ({"mode": "nvfp4", "bits": 4, "group_size": None}, 4, 16, "nvfp4", "nvfp4"),
        ({"mode": "mxfp8", "bits": None, "group_size": 32}, 8, 32, "mxfp8", "mxfp8"),
    ],
)
def test_what_is_not_set_is_the_default_of_the_mode(
    settings: Mapping[str, Any], bits: int, group: int, mode: str, label: str
) -> None:
    found = weights(settings, packed("a", bits, group, mode=mode) | {"n": entry("F16", 5)})
    assert (found.parameters, found.label) == (16 * 256 + 5, label)
    assert found.main is not None
    assert (found.main.bits, found.main.group_size) == (bits, group)
    complete = mlx_settings({"quantization": settings})
    assert complete is not None
    assert (complete["bits"], complete["group_size"], complete["mode"]) == (bits, group, mode)


def test_layers_have_settings_of_their_own_or_are_left_dense() -> None:
    settings = {
        "bits": None, "group_size": None, "mode": "mxfp4",
        "b": {"bits": 8, "group_size": 32, "mode": "affine"},
        "c": {"bits": None, "group_size": None, "mode": "nvfp4"},
        "d": {"bits": 6}, "e": False, "f": True,
    }  # fmt: skip
    tensors = {
        **packed("a", 4, 32, mode="mxfp4"), **packed("b", 8, 32),
        **packed("c", 4, 16, mode="nvfp4"), **packed("d", 6, 64),
        "e.weight": entry("F16", 16, 256), **packed("f", 4, 32, mode="mxfp4"),
    }  # fmt: skip
    assert weights(settings, tensors).parameters == 6 * 16 * 256


def test_a_layer_without_settings_may_differ_in_one_of_them() -> None:
    tensors = packed("a", 4, 64) | packed("head", 8, 64) | packed("embed", 6, 64)
    assert weights({"bits": 4, "group_size": 64}, tensors).parameters == 3 * 16 * 256


def test_the_models_sizes_tell_what_words_and_groups_leave_open() -> None:
    settings = {"bits": 4, "group_size": 64}
    tensors = packed("a", 4, 64) | packed("b", 8, 32)
    assert weights(settings, tensors, hidden_size=256).parameters == 2 * 16 * 256
    sizes = {"num_attention_heads": 4, "head_dim": 64}
    assert weights(settings, tensors, **sizes).parameters == 2 * 16 * 256


def test_a_layer_of_another_mode_is_known_by_its_tensors() -> None:
    settings = {"bits": 4, "group_size": 64, "head": {"bits": 4, "group_size": 64}}
    tensors = packed("experts", 4, 32, mode="mxfp4") | packed("head", 4, 64)
    assert weights(settings, tensors).parameters == 2 * 16 * 256


def test_experts_count_all() -> None:
    tensors = {
        "a.weight": entry("U32", 8, 16, 32),
        "a.scales": entry("F16", 8, 16, 4),
        "a.biases": entry("F16", 8, 16, 4),
    }
    assert weights({"bits": 4, "group_size": 64}, tensors).parameters == 8 * 16 * 256


def test_factors_of_experts_stay() -> None:
    tensors = packed("a", 4, 16, mode="nvfp4") | {"a.global_scale": entry("F32", 8)}
    found = weights({"mode": "nvfp4"}, tensors)
    assert found.keeps_packed
    assert found.parameters == 16 * 256


def test_older_settings_are_read_where_other_tools_have_theirs() -> None:
    config = {"quantization_config": {"bits": 4, "group_size": 64}}
    assert mlx_weights(CONFIG, config, packed("a", 4, 64)).label == "4bit"
    assert mlx_settings({"quantization_config": {"quant_method": "awq", "bits": 4}}) is None


@pytest.mark.parametrize(
    ("settings", "tensors", "reason"),
    [
        ({"bits": 4, "group_size": 64}, {"a.weight": entry("F16", 4, 4)}, "no weight is quantized"),
        (None, packed("a", 4, 64), "no quantization, but the weights are quantized"),
        ([4], packed("a", 4, 64), "not an object"),
        ({"bits": 7, "group_size": 64}, packed("a", 4, 64), "bits='7'.*1, 2, 3"),
        ({"bits": True, "group_size": 64}, packed("a", 4, 64), "bits='True'"),
        ({"bits": 2**80, "group_size": 64}, packed("a", 4, 64), "bits="),
        ({"bits": 4, "group_size": 16}, packed("a", 4, 64), "group_size='16'"),
        ({"mode": "mxfp4", "bits": 8}, packed("a", 4, 32, mode="mxfp4"), "for mxfp4 MLX has 4"),
        ({"mode": "int4"}, packed("a", 4, 64), "mode 'int4'"),
        ({"mode": []}, packed("a", 4, 64), "mode"),
        ({"bits": 8, "group_size": 128}, packed("a", 3, 32), "8 bits and group size 128"),
        ({"bits": 8, "group_size": 64}, packed("a", 4, 64), "another layout than affine with 8"),
        ({"bits": 4, "a": {"bits": 8, "group_size": 64}}, packed("a", 4, 64), "do not have"),
        ({"bits": 4, "a": {"bits": 4, "mode": "x"}}, packed("a", 4, 64), "mode 'x'"),
        ({"bits": 4, "a": {"mode": "mxfp4"}}, packed("a", 4, 32), "do not have"),
        ({"bits": 4, "a": False}, packed("a", 4, 64), "set to have none"),
        ({"bits": 4, "a": True}, packed("a", 8, 64), "do not have"),
        ({"bits": 4}, packed("a", 4, 64) | {"a.biases": entry("F16", 1, 1)}, "do not match each"),
        ({"bits": 4}, packed("a", 4, 64) | {"a.scales": entry("F16", 16, 0)}, "do not match each"),
        ({"bits": 4}, packed("a", 4, 64) | {"a.weight": entry("F16", 16, 32)}, "do not match each"),
        ({"bits": 4}, packed("a", 4, 64) | {"a.weight": entry("U32")}, "do not match each"),
        (
            {"mode": "mxfp4"},
            packed("a", 4, 32, mode="mxfp4") | {"a.biases": entry("U8", 16, 8)},
            "do not match each",
        ),
    ],
)
def test_lies_are_refused_with_words(settings: Any, tensors: Any, reason: str) -> None:
    with pytest.raises(BrokenModel, match=reason):
        weights(settings, tensors)


def test_another_tools_method_in_mlx_files_is_refused_by_its_name() -> None:
    config = {"quantization_config": {"quant_method": "bitnet"}}
    with pytest.raises(BrokenModel, match="'bitnet'"):
        mlx_weights(CONFIG, config, {"a.weight": entry("U8", 4, 4)})


def test_no_setting_does_more_than_refuse() -> None:
    generator = np.random.default_rng(11)
    junk: list[Any] = [None, -1, 0, 2**80, 1.5, "x" * 300, [], {}, {"a": {}}, True, "\ud800"]
    tensors = packed("a", 4, 64) | packed("b", 8, 32)
    for _ in range(400):
        settings: dict[str, Any] = {"bits": 4, "group_size": 64, "b": {"bits": 8, "group_size": 32}}
        inner = settings if generator.random() < 0.5 else settings["b"]
        key = str(generator.choice(["bits", "group_size", "mode", "b", "a"]))
        inner[key] = junk[generator.integers(len(junk))]
        message = ""
        try:
            found = weights(settings, tensors, hidden_size=256)
        except BrokenModel as problem:
            message = problem.message
        else:
            # A layer set to the model's own layout is taken at its word.
            assert found.parameters in (2 * 16 * 256, 3 * 16 * 256)
        assert len(message) < 700
