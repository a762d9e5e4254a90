"""Refuses weights that are not finite numbers, or that the wanted precision cannot hold."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BrokenModel, RequestError


def not_finite(name: str) -> BrokenModel:
    """Return the error for a tensor with values that are not numbers."""
    return BrokenModel(
        f"The tensor {name!r} has values that are not numbers (NaN or infinity): the file is "
        "damaged. Download the model again.",
        param="model",
    )


def too_large(name: str, largest: float | None = None) -> RequestError:
    """Return the error for a tensor with values that the wanted type cannot hold."""
    found = "values that are too large" if largest is None else f"the value {largest:.6g}"
    return RequestError(
        f"The tensor {name!r} has {found}, but f16 holds at most "
        f"{float(np.finfo(np.float16).max):g}. Choose the quantization bf16 or f32.",
        param="quantization",
    )


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Raise BrokenModel if the tensor `name` has NaN or infinity."""
    if not np.isfinite(values).all():
        raise not_finite(name)


def as_float16(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return finite `values` as float16.  Raises RequestError if one is too large for that."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise too_large(name, float(np.abs(values).max()))
    return half


def cast_checked(name: str, tensor: Any, dtype: Any) -> Any:
    """Return a PyTorch tensor in another floating type.

    Raises BrokenModel for NaN, RequestError for values too large for float16.
    """
    import torch

    cast = tensor.to(dtype)
    if torch.isnan(tensor).any():
        raise not_finite(name)
    # Masks that were stored as buffers are infinite.
    if (torch.isinf(cast) & ~torch.isinf(tensor)).any():
        raise too_large(name, float(tensor[~torch.isinf(tensor)].abs().max()))
    return cast
