"""Refuses weights that are not finite numbers, or that the wanted precision cannot hold."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BrokenModel, RequestError


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Raise BrokenModel if the tensor `name` has NaN or infinity."""
    if not np.isfinite(values).all():
        raise BrokenModel(
            f"The tensor {name!r} has values that are not numbers (NaN or infinity): the file is "
            "damaged. Download the model again.",
            param="model",
        )


def as_float16(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return finite `values` as float16.  Raises RequestError if one is too large for that."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(values).max())
        raise RequestError(
            f"The tensor {name!r} has the value {largest:.6g}, but f16 holds at most "
            f"{float(np.finfo(np.float16).max):g}. Choose the quantization bf16 or f32.",
            param="quantization",
        )
    return half
