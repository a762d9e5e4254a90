"""The starter in every format, as backends open it."""

from collections.abc import Mapping
from pathlib import Path

from backends.base import Engine, EngineOptions, ModelInfo
from backends.echo import echo_info
from backends.registry import load_backends
from tests.golden import golden
from tests.starter import starter_path

# Which golden model each variant is of; those without one are installed with the packages.
GOLDEN: Mapping[str, str] = {
    "gguf-f32": "gguf-f32",
    "mlx-f32": "mlx-f32",
    "mlx-4bit": "mlx-4bit",
    "mlx-npz": "npz",
    "safetensors": "hf-f32",
    "pytorch-bin": "pytorch",
    "pytorch-pt": "pt",
    "onnx-f32": "onnx-f32",
    "onnx-int4": "onnx-int4",
    "onnx-plain": "onnx-torch",
    "coreml": "coreml",
}
# Two more files that the same two engines read differently have tests of their own.
VARIANTS = ("echo", "gguf", *(name for name in GOLDEN if name not in ("mlx-npz", "pytorch-pt")))
# Whose greedy tokens are those of the reference, one by one.
FULL_PRECISION = (
    *("gguf-f32", "mlx-f32", "mlx-npz", "safetensors", "pytorch-bin", "pytorch-pt", "onnx-f32"),
    *("onnx-plain", "coreml"),
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.onnx", "*.mlpackage/Manifest.json")


def info_of(variant: str) -> ModelInfo:
    """Return a variant's description, building the golden model where needed; blocks."""
    if variant == "echo":
        return echo_info()
    path = golden(GOLDEN[variant]) if variant in GOLDEN else starter_path()
    if path.is_dir():
        path = weights_of(path)
    return load_backends()[variant.partition("-")[0]].identify(path)


def weights_of(folder: Path) -> Path:
    """Return the file of a golden folder that a scan would find the model by."""
    found = [path for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]
    assert found, f"{folder} has no weights"
    return found[0]


def open_variant(variant: str, options: EngineOptions) -> Engine:
    """Open a variant; blocks.  Its golden model must have been built where a loop runs."""
    info = info_of(variant)
    return load_backends()[info.format].open(info, options)
