"""Weights that are no numbers, and those that float16 cannot hold, are refused by name."""

import numpy as np
import pytest

from catalog.convert.steps.number_check import as_float16, check_finite
from core.errors import BrokenModel, RequestError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_with_a_value_that_is_no_number_is_refused(value: float) -> None:
    values = np.ones((3, 4), np.float32)
    check_finite("good", values)
    values[1, 2] = value
    with pytest.raises(BrokenModel, match=r"'blk.0.attn_q.weight' .*NaN or infinity"):
        check_finite("blk.0.attn_q.weight", values)


def test_values_that_fit_float16_are_cast() -> None:
    values = np.array([1.5, -65504.0, 1e-9], np.float32)
    half = as_float16("w", values)
    assert half.dtype == np.float16
    assert half.tolist() == [1.5, -65504.0, 0.0]


@pytest.mark.parametrize("value", [70_000.0, -1e30])
def test_values_too_large_for_float16_are_refused_with_what_to_choose(value: float) -> None:
    with pytest.raises(RequestError, match=r"at most 65504\. Choose .* bf16") as caught:
        as_float16("w", np.array([1.0, value], np.float32))
    assert caught.value.param == "quantization"
