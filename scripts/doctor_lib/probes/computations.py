"""Probes of step `compute`: small computations on the GPU, or the CPU, and their errors.

Usage: python -m scripts.doctor_lib.probes.computations NAME
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scripts.doctor_lib.probes.mlx_variables import compare
from scripts.doctor_lib.probes.result import Found, print_result
from scripts.doctor_lib.row import WARN

_SIZE = 1024
# Relative to the largest number: float32 sums in another order.
_MATMUL_ERROR = 1e-3
_LENGTHS = (1, 2, 7, 32, 128)
_SEND = "send the report"


def mlx_matmul() -> Found:
    """Multiply matrices with MLX on its default device and compare with the CPU."""
    import mlx.core as mx

    mx.random.seed(0)
    a, b = mx.random.normal((_SIZE, _SIZE)), mx.random.normal((_SIZE, _SIZE))
    mx.eval(a, b)
    began = time.monotonic()
    result = a @ b
    mx.eval(result)
    took = time.monotonic() - began
    exact = mx.matmul(a, b, stream=mx.cpu)
    error = float(mx.abs(result - exact).max() / mx.abs(exact).max())
    return _compared(f"{mx.default_device()}, {took * 1e3:.0f} ms", error, _MATMUL_ERROR)


def torch_matmul() -> Found:
    """Multiply a transposed matrix with PyTorch on Metal and compare with the CPU."""
    import torch

    torch.manual_seed(0)
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    exact = a.T @ b
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    began = time.monotonic()
    result = (a.to(device).T @ b.to(device)).cpu()
    took = time.monotonic() - began
    error = float((result - exact).abs().max() / exact.abs().max())
    return _compared(f"{device}, {took * 1e3:.0f} ms", error, _MATMUL_ERROR)


def encoder() -> Found:
    """Compute the ONNX starter at five lengths; on a Mac compare Core ML with the CPU."""
    import numpy as np
    import onnxruntime

    from catalog.scan.starters import STARTERS, installed_starter

    found = next((one for one in STARTERS if one.file.endswith(".onnx")), None)
    installed = installed_starter(found) if found else None
    if installed is None:
        return Found("no ONNX starter", "It is not installed.", "scripts/setup torch", WARN)
    path = str(installed.path)
    exact = _encode(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    if not all(np.isfinite(one).all() for one in exact):
        return Found("CPU", "The vectors are not finite.", _SEND)
    if sys.platform != "darwin":
        return Found(f"CPU, {len(exact)} lengths")
    # What the server does not use unless it is asked to: the row tells whether it could.
    providers = ["CoreMLExecutionProvider", "CPUExecutionProvider"]
    try:
        others = _encode(onnxruntime.InferenceSession(path, providers=providers))
    except Exception as problem:
        return Found(f"CPU; Core ML fails: {str(problem)[:200]}")
    errors = (
        float(np.abs(one - other).max() / np.abs(one).max())
        for one, other in zip(exact, others, strict=True)
    )
    return Found(f"CPU; Core ML differs by {max(errors):.2g}")


def _encode(session: Any) -> list[Any]:
    """Return the first output for a text of each length."""
    import numpy as np

    outputs = []
    for length in _LENGTHS:
        ids = np.arange(length, dtype=np.int64)[None, :] + 1000
        fill = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        inputs = {one.name: fill.get(one.name, np.zeros_like(ids)) for one in session.get_inputs()}
        outputs.append(session.run(None, inputs)[0])
    return outputs


def core_ml() -> Found:
    """Compile, load and run a small Core ML program on each kind of processor.

    Also tells whether other threads of the process ran meanwhile.
    """
    import coremltools as ct
    import numpy as np
    from coremltools.converters.mil import Builder as mb

    def multiply(x: Any) -> Any:
        return mb.matmul(x=x, y=np.eye(64, dtype=np.float32))

    program = mb.program(input_specs=[mb.TensorSpec(shape=(1, 64))])(multiply)
    value = []
    with tempfile.TemporaryDirectory(prefix="impetus-doctor-") as folder:
        path = str(Path(folder) / "probe.mlpackage")
        ct.convert(program, convert_to="mlprogram", skip_model_load=True).save(path)
        for units in ct.ComputeUnit:
            with _Ticker() as ticker:
                model = ct.models.MLModel(path, compute_units=units)
                out = model.predict({"x": np.ones((1, 64), dtype=np.float32)})
            if abs(float(next(iter(out.values())).max()) - 1.0) > 0.01:
                return Found(units.name, f"{units.name} computes something else.", _SEND, WARN)
            value.append(f"{units.name} {ticker.seconds:.1f} s, gaps up to {ticker.gap_s:.1f} s")
    return Found("; ".join(value))


class _Ticker:
    """A thread that notes the longest time during which it could not run."""

    def __init__(self) -> None:
        self.seconds = self.gap_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Ticker":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(0.01):
            now = time.monotonic()
            self.gap_s, last = max(self.gap_s, now - last), now


def _compared(value: str, error: float, most: float) -> Found:
    problem = "" if error <= most else f"It differs from the CPU by {error:.2g}, over {most:g}."
    return Found(f"{value}, error {error:.1g}", problem, _SEND)


PROBES: Mapping[str, Callable[[], Found]] = MappingProxyType(
    {
        "MLX": mlx_matmul,
        "variables of MLX": compare,
        "PyTorch": torch_matmul,
        "ONNX encoder": encoder,
        "Core ML": core_ml,
    }
)

if __name__ == "__main__":
    print_result(PROBES, sys.argv[1])
