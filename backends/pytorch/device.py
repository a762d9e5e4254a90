"""Chooses the device of PyTorch models: Apple's GPU if it computes rightly, else the CPU."""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

# How far results of a type may be from the CPU's in float32, relative to the largest one.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_ROWS, _WIDTH, _HEADS, _HEAD = 48, 96, 4, 24


@cache
def device() -> str:
    """Return the device that models run on: Metal if it is right, else the CPU.

    Blocks for less than a second, once in a process.
    """
    import torch

    if not torch.backends.mps.is_available():
        return "cpu"
    if problem := device_problem("mps"):
        logger.warning("PyTorch models run on the CPU: on Apple's GPU %s", problem)
        return "cpu"
    return "mps"


def device_problem(name: str) -> str:
    """Return what a device computes otherwise than the CPU, as a clause; empty if nothing.

    PyTorch was wrong without any error for some layouts and types on Metal.  Source: pytorch
    issues 181133, 193487 and 195910.
    """
    import torch

    for kind, tolerance in _TOLERANCES.items():
        dtype = getattr(torch, kind)
        for what, compute, inputs in _passes():
            rounded = [each.to(dtype) for each in inputs]
            expected = compute(*(each.float() for each in rounded))
            try:
                found = compute(*(each.to(name) for each in rounded)).float().cpu()
            except (RuntimeError, NotImplementedError) as error:
                return f"{what} in {kind} failed ({str(error)[:200]})"
            error_size = float((found - expected).abs().max() / expected.abs().max())
            # Also for NaN, which is not below any limit.
            if not error_size <= tolerance:
                return f"{what} in {kind} is off by {error_size:.2g}"
    return ""


def _passes() -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """Yield what models compute, in the layouts that were wrong: name, function, inputs."""
    import torch
    from torch.nn import functional

    source = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=source)

    def attention(rows: Any) -> Any:
        # Heads side by side, as slices of one projection.
        query, key, value = rows.view(1, _ROWS, 3, _HEADS, _HEAD).transpose(1, 3).unbind(2)
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    yield "a product", torch.matmul, [random(_ROWS, _WIDTH), random(_WIDTH, _ROWS)]
    yield (
        "a product of a transposed matrix",
        lambda left, right: left.transpose(0, 1) @ right,
        [random(_WIDTH, _ROWS), random(_WIDTH, _ROWS)],
    )
    yield "a linear layer", functional.linear, [random(_ROWS, _WIDTH), random(_ROWS, _WIDTH)]
    yield (
        "a batch of products with strides",
        lambda left, right: left.transpose(1, 2)[:, :, ::2] @ right[:, ::2].contiguous(),
        [random(2, _WIDTH, _ROWS), random(2, _WIDTH, _ROWS)],
    )
    yield "causal attention", attention, [random(_ROWS, 3 * _HEADS * _HEAD)]
