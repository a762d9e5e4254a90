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
from core.process_memory import footprint_bytes
from core.units import MIB

# Called with the memory of the running step's processes, in bytes.
OnMemory: TypeAlias = Callable[[int], None]

_WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class _StepMemory:
    """Peak memory of a step in bytes: a base for its packages, plus what grows with the model.

    `largest_bytes` counts per element of the largest tensor, `token_bytes` per token of the
    vocabulary, `context_bytes` per token of the context, `layer_bytes` per layer.
    """

    base_bytes: int
    per_source_byte: float = 0.0
    parameter_bytes: float = 0.0
    largest_bytes: float = 0.0
    token_bytes: int = 0
    context_bytes: int = 0
    layer_bytes: int = 0


# Measured on Linux with models of 46 to 170 million parameters, rounded up, without mapped files.
# Weights are written in pieces, so that steps depend on the largest tensor at most; only Core ML's
# exporter loads the whole model.  A checkpoint that is no archive is loaded as a whole, too.
# ONNX is the larger of both exporters: PyTorch's has a graph of some MiB per layer, the builder
# makes the angles of all rotary positions.
_STEPS: Mapping[tuple[str, str], _StepMemory] = {
    ("pytorch", "safetensors"): _StepMemory(300 * MIB, per_source_byte=1.0),
    ("safetensors", "safetensors"): _StepMemory(300 * MIB),
    ("gguf", "safetensors"): _StepMemory(380 * MIB, token_bytes=1300),
    ("gguf", "gguf"): _StepMemory(100 * MIB, largest_bytes=6.0),
    ("gguf", "mlx"): _StepMemory(380 * MIB, token_bytes=1300),
    ("safetensors", "mlx"): _StepMemory(260 * MIB, largest_bytes=7.0),
    ("safetensors", "gguf"): _StepMemory(300 * MIB, largest_bytes=6.0, token_bytes=1300),
    ("safetensors", "onnx"): _StepMemory(
        420 * MIB, largest_bytes=0.75, context_bytes=2560, layer_bytes=6 * MIB
    ),
    ("safetensors", "coreml"): _StepMemory(1300 * MIB, parameter_bytes=2.5),
}
_F32_BYTES = 4


def needed_bytes(source: ModelInfo, route: tuple[str, ...]) -> int:
    """Return the estimated peak memory in bytes of a conversion along the formats of `route`."""
    needed, size = 0, source.size_bytes
    largest, tokens = _largest_tensor(source), _detail(source, "vocabulary_size")
    for pair in pairwise(route):
        step = _STEPS[pair]
        used = step.per_source_byte * size + step.parameter_bytes * source.parameters
        used += step.largest_bytes * largest + step.token_bytes * tokens
        used += step.context_bytes * source.context_length
        used += step.layer_bytes * _detail(source, "n_layer")
        needed = max(needed, step.base_bytes + int(used))
        # Weights from GGUF continue as f32 at most, all others in their own type.
        size = source.parameters * _F32_BYTES if route[0] == "gguf" else size
    return needed


def _largest_tensor(source: ModelInfo) -> int:
    """Return the elements of the embeddings, or of one layer's experts in one tensor."""
    width = _detail(source, "n_embd")
    experts = _detail(source, "expert_count") * _detail(source, "n_ff")
    largest = width * max(_detail(source, "vocabulary_size"), experts)
    return min(largest, source.parameters) or source.parameters


def _detail(source: ModelInfo, name: str) -> int:
    value = source.details.get(name, 0)
    return value if type(value) is int else 0


def process_tree_bytes(pid: int) -> int:
    """Return the private memory in bytes of a process and its descendants; 0 if unknown.

    Mapped files are not counted, because the system drops their pages when memory is short.
    Blocks for some milliseconds.  Source: psutil's `shared` on Linux, `proc_pid_rusage` on macOS.
    """
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += _private_bytes(process)
    except (psutil.Error, OSError):
        return total
    return total


def _private_bytes(process: psutil.Process) -> int:
    if sys.platform == "darwin":
        return footprint_bytes(process.pid) or 0
    info = process.memory_info()
    return int(info.rss - info.shared)


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
