"""Sizes that a configuration claims are compared with its tensors before a model is built."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from backends.hf.config import HfFolder
from backends.hf.fit import TensorShape, check_claims, first_line
from core.errors import BrokenModel

TENSORS = {
    "embed.weight": TensorShape("F32", (512, 64)),
    **{f"layers.{i}.weight": TensorShape("F32", (64, 64)) for i in range(4)},
}
HONEST = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512, "num_experts": 8}


def folder_of(config: dict[str, Any]) -> HfFolder:
    empty: MappingProxyType[str, Any] = MappingProxyType({})
    return HfFolder(Path("/m"), MappingProxyType(config), empty, empty, None, "")


def test_sizes_that_the_tensors_have_pass() -> None:
    check_claims(folder_of(HONEST), TENSORS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1_000_000),
        ("num_layers", 6),
        ("num_experts", 1_000_000),
        ("n_routed_experts", 2**31 - 1),
        ("hidden_size", 2**31 - 1),
        ("d_model", 10**30),
        ("vocab_size", 513),
        ("num_nextn_predict_layers", 1_000_000),
        ("moe_num_experts", 1_000_000),
    ],
)
def test_a_claim_that_no_tensor_supports_is_refused_with_its_numbers(key: str, value: int) -> None:
    with pytest.raises(BrokenModel, match=f"{key}={value}"):
        check_claims(folder_of({**HONEST, key: value}), TENSORS)


def test_claims_of_nested_configurations_are_checked() -> None:
    config = {**HONEST, "vision_config": {"depths": [1], "deep": {"num_hidden_layers": 10**6}}}
    with pytest.raises(BrokenModel, match="num_hidden_layers=1000000"):
        check_claims(folder_of(config), TENSORS)


def test_a_dense_model_may_keep_the_default_number_of_experts() -> None:
    dense = {**HONEST, "is_moe": False, "num_experts": 16_384}
    check_claims(folder_of(dense), TENSORS)
    for config in ({**dense, "is_moe": True}, {**dense, "num_experts": 1_000_000}):
        with pytest.raises(BrokenModel, match="num_experts="):
            check_claims(folder_of(config), TENSORS)


@pytest.mark.parametrize("value", ["64", None, 1e300, [10**9], True])
def test_a_claim_that_is_no_number_is_left_to_the_runtime(value: Any) -> None:
    check_claims(folder_of({**HONEST, "num_experts": value}), TENSORS)


def test_a_reason_is_one_short_line() -> None:
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 10_000))) == 300
