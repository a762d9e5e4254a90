"""Speeds up linear layers of a transformers model for 7 to 56 rows per step, with MKL."""

from types import MethodType
from typing import Any

# Measured with MKL on two cores, weights of 192 × 576 to 11008 × 4096: with fewer rows, and with
# 60 or more, most layers are at least as fast with the weights on the right.
_MIN_ROWS = 7
_MAX_ROWS = 56
# Layers with fewer outputs were slower as often as faster.
_MIN_OUTPUTS = 513


def speed_up_linear_layers(model: Any) -> int:
    """Put the weights on the left in a model's linear layers; return how many were changed.

    MKL multiplies a tall matrix by a few columns in about two thirds of the time that it needs
    for a few rows by a wide one.  Nothing changes for other libraries, devices and types, nor
    for layers that are not exactly `torch.nn.Linear`.
    """
    import torch

    if not torch.backends.mkl.is_available():
        return 0
    changed = 0
    for module in model.modules():
        if type(module) is not torch.nn.Linear or "forward" in vars(module):
            continue
        weight = module.weight
        is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        if is_plain and weight.shape[0] >= _MIN_OUTPUTS:
            module.forward = MethodType(_forward, module)
            changed += 1
    return changed


def _forward(module: Any, inputs: Any) -> Any:
    """Replace `torch.nn.Linear.forward`: (..., inputs) → (..., outputs)."""
    import torch

    rows = inputs.numel() // inputs.shape[-1]
    if not _MIN_ROWS <= rows <= _MAX_ROWS:
        return torch.nn.functional.linear(inputs, module.weight, module.bias)
    columns = inputs.reshape(rows, -1).t().contiguous()
    outputs = torch.mm(module.weight, columns).t()
    if module.bias is not None:
        outputs = outputs + module.bias
    return outputs.contiguous().view(*inputs.shape[:-1], -1)
