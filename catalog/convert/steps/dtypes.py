"""Names of element types in quantizations, PyTorch and safetensors."""

from typing import Any

# Quantization: PyTorch's name.
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# safetensors' name: PyTorch's name.
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def raw_bytes(tensor: Any) -> Any:
    """Return the bytes of a PyTorch tensor as a NumPy array, for any element type."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
