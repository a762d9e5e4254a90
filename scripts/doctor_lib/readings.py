"""Steps `readings` and `compute`: runs each probe in a process of the virtual environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.row import FAIL, NEEDS_MAC, OK, WARN, Row, skipped

_LIMIT_S = 60.0
# Compiling kernels and Core ML programs for the first time takes minutes on some Macs.
_COMPUTE_LIMIT_S: Mapping[str, float] = MappingProxyType({"darwin": 240.0})
# The names of the probes, with whether only a Mac has them; `probes` may not be imported here.
READINGS: Mapping[str, bool] = MappingProxyType(
    {
        "settings": False,
        "memory budget": False,
        "Metal's working set": True,
        "path of an open file": True,
        "memory of a process": False,
        "sensors": False,
        "threads": False,
        "inspection of a model": False,
        "chat template": False,
        "turns of two processes": False,
        "Unix socket": False,
        "port in use": False,
    }
)
COMPUTATIONS: Mapping[str, bool] = MappingProxyType(
    {
        "MLX": False,
        "variables of MLX": True,
        "PyTorch": False,
        "starter by llama.cpp": False,
        "ONNX encoder": False,
        "Core ML": True,
    }
)
# Other formats work without these.
_OPTIONAL = frozenset(
    {
        "PyTorch", "ONNX encoder", "Core ML", "MLX", "variables of MLX", "Metal's working set",
    }
)  # fmt: skip


def reading_rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of the server's own readings."""
    yield from _rows(machine, "probes", READINGS, _LIMIT_S)


def compute_rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of computations."""
    limit_s = _COMPUTE_LIMIT_S.get(machine.system, _LIMIT_S)
    yield from _rows(machine, "gpu_probes", COMPUTATIONS, limit_s)


def _rows(
    machine: Machine, module: str, probes: Mapping[str, bool], limit_s: float
) -> Iterator[Row]:
    for name, needs_mac in probes.items():
        if not machine.is_set_up:
            yield skipped(name, "scripts/setup has not run yet")
        elif needs_mac and not machine.is_mac:
            yield skipped(name, NEEDS_MAC)
        else:
            yield run_probe(machine, module, name, limit_s)


def run_probe(machine: Machine, module: str, name: str, limit_s: float) -> Row:
    """Run a probe and return its row; a crash or a hang of the process is a result too."""
    command = [str(machine.python), "-B", "-m", f"scripts.doctor_lib.{module}", name]
    done = machine.run(*command, limit_s=limit_s)
    state = WARN if name in _OPTIONAL else FAIL
    try:
        found = json.loads(done.last_line)
        problem = str(found["problem"])
        kind = str(found["state"]) if problem else OK
        cure = str(found["cure"]) if problem else ""
        row = Row(name, kind, str(found["value"]), problem, cure)
    except (ValueError, KeyError, TypeError):
        problem = f"The probe {done.ended or 'gave no result'}: {done.last_line[-300:]}"
        return Row(name, state, f"{done.seconds:.1f} s", problem, "send the report")
    if done.code:
        return Row(name, WARN, row.value, f"At its end the probe {done.ended}.", "send the report")
    return row
