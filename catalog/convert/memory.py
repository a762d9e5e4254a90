"""Estimates a conversion's memory in advance, and measures it while it runs."""

import asyncio
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import psutil

from backends.base import ModelInfo
from catalog.convert.graph import MLX_BITS, ORIGINAL
from core.units import MIB

# Called with the memory of the running step's processes, in bytes.
OnMemory: TypeAlias = Callable[[int], None]

_WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class _StepMemory:
    """Peak memory of a step: a base for its packages, plus shares per source byte and parameter.

    `parameter_bytes` None means 1.1 times the bytes per weight of the target, plus 0.5.
    """

    base_bytes: int
    per_source_byte: float
    parameter_bytes: float | None


# Measured on Linux with models of 46 and 170 million parameters in f32, rounded up, without mapped
# files.  ONNX in f32 is measured with PyTorch's exporter, which needs more than the builder.
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
    """Return the estimated peak memory in bytes of a conversion along the formats of `route`."""
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
        # Weights from GGUF continue as f32, all others in their own type.
        size = source.parameters * _F32_BYTES if route[0] == "gguf" else size
    return needed


def _bytes_per_weight(quantization: str, source: ModelInfo) -> float:
    """Return the bytes per weight in MLX, including the scales of each group."""
    bits = MLX_BITS.get(quantization)
    if bits is not None:
        return bits / 8 + 0.0625
    return _WIDTHS.get(quantization, source.size_bytes / max(source.parameters, 1))


def process_tree_bytes(pid: int) -> int:
    """Return the private memory in bytes of a process and its descendants; 0 if unknown.

    Mapped files are not counted, because the system drops their pages when memory is short.
    Blocks for some milliseconds.  Source: psutil's `shared` on Linux, else its `uss`.
    """
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            info = process.memory_info()
            has_shared = hasattr(info, "shared")
            total += info.rss - info.shared if has_shared else process.memory_full_info().uss
    except (psutil.Error, OSError):
        return total
    return total


def peak_bytes() -> int:
    """Return the highest resident memory of this process in bytes, mapped files included."""
    try:
        # The other counter includes what the parent held when this process was started.
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


async def watch_memory(pid: int, on_memory: OnMemory) -> None:
    """Call `on_memory` twice a second with the memory of the processes, until cancelled."""
    while True:
        await asyncio.sleep(_WATCH_INTERVAL_S)
        if used := await asyncio.to_thread(process_tree_bytes, pid):
            on_memory(used)
