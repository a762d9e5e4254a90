"""Steps `readings` and `compute`: runs each probe in a process of the virtual environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from scripts.doctor_lib.child import in_order
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.row import FAIL, NEEDS_MAC, OK, WARN, Row, skipped

_SEND = "send the report"
_LIMIT_S = 60.0
# Most of a probe's time is the import of packages, on one core.
_LANES = 2
# Compiling kernels and Core ML programs for the first time takes minutes on some Macs.
_COMPUTE_LIMIT_S: Mapping[str, float] = MappingProxyType({"darwin": 240.0})


@dataclass(frozen=True)
class Probe:
    """Where a probe is; the modules import the server, so they may not be imported here.

    `is_optional`: other formats work without what it needs.
    """

    module: str = "own_readings"
    needs_mac: bool = False
    is_optional: bool = False


READINGS: Mapping[str, Probe] = MappingProxyType(
    {
        "settings": Probe(),
        "memory budget": Probe(),
        "Metal's working set": Probe("mac_readings", needs_mac=True, is_optional=True),
        "MLX' wired limit": Probe("generation", needs_mac=True, is_optional=True),
        "path of stderr": Probe("mac_readings"),
        "memory of a process": Probe("mac_readings"),
        "sensors": Probe(),
        "heat and pressure": Probe("mac_readings", needs_mac=True, is_optional=True),
        "threads": Probe(),
        "loaded OpenMP": Probe("libraries", is_optional=True),
        "inspection of a model": Probe(),
        "chat template": Probe(),
        "turns of two processes": Probe(),
        "Unix socket": Probe(),
        "port in use": Probe(),
    }
)
COMPUTATIONS: Mapping[str, Probe] = MappingProxyType(
    {
        "MLX": Probe("computations", is_optional=True),
        "MLX, prompt and steps": Probe("generation", is_optional=True),
        "variables of MLX": Probe("computations", needs_mac=True, is_optional=True),
        "PyTorch": Probe("computations", is_optional=True),
        "PyTorch, prompt and steps": Probe("generation", is_optional=True),
        "starter by llama.cpp": Probe("starter"),
        "ONNX encoder": Probe("computations", is_optional=True),
        "Core ML": Probe("computations", needs_mac=True, is_optional=True),
    }
)


def reading_rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of the server's own readings."""
    yield from _rows(machine, READINGS, _LIMIT_S, _LANES)


def compute_rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of computations; on a Mac one after the other, as they share the GPU."""
    lanes = 1 if machine.is_mac else _LANES
    limit_s = _COMPUTE_LIMIT_S.get(machine.system, _LIMIT_S)
    yield from _rows(machine, COMPUTATIONS, limit_s, lanes)


def _rows(
    machine: Machine, probes: Mapping[str, Probe], limit_s: float, lanes: int
) -> Iterator[Row]:
    def row(name: str, probe: Probe) -> Row:
        if machine.lacks_python:
            return skipped(name, machine.lacks_python)
        if probe.needs_mac and not machine.is_mac:
            return skipped(name, NEEDS_MAC)
        return run_probe(machine, name, probe, limit_s)

    yield from in_order([partial(row, *each) for each in probes.items()], lanes)


def run_probe(machine: Machine, name: str, probe: Probe, limit_s: float) -> Row:
    """Run a probe and return its row; a crash or a hang of the process is a result too."""
    module = f"scripts.doctor_lib.probes.{probe.module}"
    done = machine.run_python("-m", module, name, limit_s=limit_s)
    state = WARN if probe.is_optional else FAIL
    try:
        found = json.loads(done.last_line)
        problem = str(found["problem"])
        kind = str(found["state"]) if problem else OK
        cure = str(found["cure"]) if problem else ""
        row = Row(name, kind, str(found["value"]), problem, cure)
    except (ValueError, KeyError, TypeError):
        problem = f"The probe {done.ended or 'gave no result'}: {done.last_line[-300:]}"
        return Row(name, state, f"{done.seconds:.1f} s", problem, _SEND, done.tail)
    if done.code:
        problem = f"At its end the probe {done.ended}."
        return Row(name, WARN, row.value, problem, _SEND, done.tail)
    return row
