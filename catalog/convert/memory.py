"""What a conversion holds in memory: foreseen before it begins, read while it runs."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import psutil

from backends.base import ModelInfo
from catalog.convert.graph import MLX_BITS, ORIGINAL
from core.units import MIB

# Told what the running step's processes hold, in bytes.
OnMemory: TypeAlias = Callable[[int], None]

_WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class _StepMemory:
    """What a step holds at its peak: its packages, and so much for what it reads and computes.

    `parameter_bytes` None means those of the target's weights, with a tenth and half a byte more.
    """

    base_bytes: int
    per_source_byte: float
    parameter_bytes: float | None


# Measured on Linux with models of 46 and 170 million parameters in f32, rounded up; mapped files
# are not counted, but for ONNX in f32, where it is PyTorch's exporter, the larger of the two.
_STEPS: Mapping[tuple[str, str], _StepMemory] = {
    ("pytorch", "safetensors"): _StepMemory(200 * MIB, 1.0, 0.1),
    ("safetensors", "safetensors"): _StepMemory(200 * MIB, 0.0, 4.2),
    ("gguf", "safetensors"): _StepMemory(450 * MIB, 0.0, 4.5),
    ("gguf", "gguf"): _StepMemory(200 * MIB, 0.0, 0.5),
    ("gguf", "mlx"): _StepMemory(450 * MIB, 1.2, 0.1),
    ("safetensors", "mlx"): _StepMemory(350 * MIB, 0.0, None),
    ("safetensors", "gguf"): _StepMemory(250 * MIB, 0.0, 0.5),
    ("safetensors", "onnx"): _StepMemory(500 * MIB, 0.0, 6.0),
    ("safetensors", "coreml"): _StepMemory(1300 * MIB, 0.0, 2.5),
}
_QUANTIZED_ONNX = _StepMemory(500 * MIB, 0.0, 5.5)
_WIDTHS = {"f32": 4.0, "bf16": 2.0, "f16": 2.0}
_F32_BYTES = 4


def needed_bytes(source: ModelInfo, route: tuple[str, ...], quantization: str) -> int:
    """Return what the conversion by the formats of `route` holds at most, as far as is foreseen."""
    needed, size = 0, source.size_bytes
    last = len(route) - 2
    for number, pair in enumerate(pairwise(route)):
        step = _STEPS[pair]
        if pair[1] == "onnx" and quantization != "f32":
            step = _QUANTIZED_ONNX
        each = step.parameter_bytes
        if each is None:
            each = (
                1.1 * _bytes_per_weight(quantization if number == last else ORIGINAL, source) + 0.5
            )
        used = step.per_source_byte * size + each * source.parameters
        needed = max(needed, step.base_bytes + int(used))
        # A GGUF file's weights go on in f32, all others as they are.
        size = source.parameters * _F32_BYTES if route[0] == "gguf" else size
    return needed


def _bytes_per_weight(quantization: str, source: ModelInfo) -> float:
    """Return the bytes of one weight in MLX, those of groups' scales included."""
    bits = MLX_BITS.get(quantization)
    if bits is not None:
        return bits / 8 + 0.0625
    return _WIDTHS.get(quantization, source.size_bytes / max(source.parameters, 1))


def process_tree_bytes(pid: int) -> int:
    """Return the bytes that a process and its descendants hold alone; 0 where nobody says.

    Mapped files are left out where they can be told apart: their pages go when others need them.
    Blocks for some milliseconds.  Source: psutil's `shared` on Linux, else its `uss`.
    """
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            info = process.memory_info()
            is_told_apart = hasattr(info, "shared")
            total += info.rss - info.shared if is_told_apart else process.memory_full_info().uss
    except (psutil.Error, OSError):
        return total
    return total


async def watch_memory(pid: int, on_memory: OnMemory) -> None:
    """Tell twice a second what the processes hold, until cancelled."""
    while True:
        await asyncio.sleep(_WATCH_INTERVAL_S)
        if used := await asyncio.to_thread(process_tree_bytes, pid):
            on_memory(used)
