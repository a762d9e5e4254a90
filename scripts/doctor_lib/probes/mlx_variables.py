"""Measures which variables of MLX make small steps on Apple's GPU faster, each in a process.

Usage: python -m scripts.doctor_lib.probes.mlx_variables

They are read when MLX starts, and what they change depends on the chip and on macOS: the server
sets none of them until Macs have shown which ones help.  Source: MLX, `mlx/utils.h` and
`mlx/fence.h`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from scripts.doctor_lib.probes.result import Found
from scripts.doctor_lib.row import WARN

# What others set.  Sources: oMLX, vLLM-Metal.
SETTINGS: tuple[Mapping[str, str], ...] = (
    MappingProxyType({}),
    MappingProxyType({"MLX_METAL_FAST_SYNCH": "1"}),
    MappingProxyType({"MLX_MAX_OPS_PER_BUFFER": "100"}),
    MappingProxyType({"MLX_MAX_OPS_PER_BUFFER": "2000"}),
)
_NAMES = tuple(sorted({name for values in SETTINGS for name in values}))
_LIMIT_S = 45.0
_LAYERS, _WIDTH, _GROUP, _BITS = 24, 1024, 64, 4
_WARM_STEPS, _STEPS = 10, 100
# The same operations in another grouping give the same numbers but for rounding.
_RELATIVE_ERROR = 1e-3

Measure = Callable[[Mapping[str, str]], "tuple[float, float]"]


def measure() -> tuple[float, float]:
    """Return steps a second, and the last step's result.

    A step is what a token costs a small model in 4 bits: a chain of products, each too small to
    fill the GPU, whose result the CPU waits for.
    """
    import mlx.core as mx

    mx.random.seed(0)
    scale = _WIDTH**-0.5
    layers = [
        mx.quantize(mx.random.normal((_WIDTH, _WIDTH)) * scale, _GROUP, _BITS)
        for _ in range(_LAYERS)
    ]
    mx.eval(layers)
    # Two streams, as generation and sampling have: what passes between them has to be synchronised.
    stream = mx.new_stream(mx.default_device())
    row, result, began = mx.ones((1, _WIDTH)), 0.0, 0.0
    for step in range(_WARM_STEPS + _STEPS):
        if step == _WARM_STEPS:
            began = time.monotonic()
        with mx.stream(stream):
            for packed, scales, biases in layers:
                product = mx.quantized_matmul(
                    row, packed, scales, biases, group_size=_GROUP, bits=_BITS
                )
                row = mx.tanh(product) + row * 0.5
        result = float(mx.abs(row).sum())
    return _STEPS / (time.monotonic() - began), result


def measure_in_process(values: Mapping[str, str]) -> tuple[float, float]:
    """Measure in a process with these variables and none of the others.

    Raises OSError, subprocess.SubprocessError and ValueError if it fails.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _NAMES}
    done = subprocess.run(
        [sys.executable, "-B", "-m", "scripts.doctor_lib.probes.mlx_variables"],
        env={**kept, **values},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_LIMIT_S,
        check=True,
    )
    speed, result = json.loads(done.stdout.splitlines()[-1])
    return float(speed), float(result)


def compare(
    measured: Measure = measure_in_process, settings: Sequence[Mapping[str, str]] = SETTINGS
) -> Found:
    """Measure with each of `settings`, the first of which is none, and tell the differences."""
    told: list[str] = []
    problem, plain, exact = "", 0.0, 0.0
    for values in settings:
        name = " ".join(f"{key}={value}" for key, value in values.items()) or "no variable"
        try:
            speed, result = measured(values)
        except (OSError, subprocess.SubprocessError, ValueError, LookupError) as failure:
            told.append(f"{name} fails")
            if not values:
                return Found(told[0], f"MLX fails: {failure}"[:300], "send the report", WARN)
            continue
        if not values:
            plain, exact = speed, result
            told.append(f"{speed:.0f} steps/s")
            continue
        told.append(f"{name} {speed / plain - 1:+.0%}")
        if not abs(result - exact) <= _RELATIVE_ERROR * abs(exact):
            problem = f"With {name} MLX computes something else."
    return Found("; ".join(told), problem, "send the report; do not set it", WARN)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()) + "\n")
