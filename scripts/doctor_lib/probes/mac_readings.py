"""Probes of step `readings` whose numbers macOS' own tools tell too.

Usage: python -m scripts.doctor_lib.probes.mac_readings NAME
"""

import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from types import MappingProxyType

from core.units import GIB, MIB
from scheduler.thermal import Reading
from scripts.doctor_lib.probes.result import Found, print_result
from scripts.doctor_lib.row import WARN

_TOOL_LIMIT_S = 20.0
_SYSTEM_FOLDERS = ("/usr/bin", "/usr/sbin")
_HEAT_KEY = "com.apple.system.thermalpressurelevel"
_PRESSURE_KEY = "kern.memorystatus_vm_pressure_level"
_UNITS: Mapping[str, int] = MappingProxyType({"K": 2**10, "M": 2**20, "G": 2**30})
# Source: footprint(1) and vmmap(1); the second needs no entitlement for one's own processes.
_FOOTPRINT = re.compile(r"[Ff]ootprint:\s*([\d.]+)\s*([KMG])")
_SEND = "send the report"


def told(*command: str) -> str:
    """Return what one of macOS' tools prints, stripped; empty if it fails."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *_SYSTEM_FOLDERS))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TOOL_LIMIT_S,
            env={**os.environ, "PATH": path},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def metal() -> Found:
    """Compare Metal's working set as the server reads it with the one that MLX reads.

    Also tells whether a process gets a default device before CoreGraphics is loaded.
    """
    # Before any import that loads CoreGraphics.
    has_device = _has_default_device()

    import mlx.core as mx

    from scheduler.sensors.macos_memory import MacLimits

    own = MacLimits().gpu_bytes() or 0
    other = int(mx.device_info()["max_recommended_working_set_size"])
    bare = "a" if has_device else "no"
    value = f"{own / GIB:.2f} GiB; MLX {other / GIB:.2f} GiB; {bare} device without CoreGraphics"
    is_near = abs(own - other) < MIB or MacLimits().wired_limit_bytes() is not None
    return Found(value, "" if is_near else "The two differ.", _SEND, WARN)


def _has_default_device() -> bool:
    library = ctypes.CDLL("/System/Library/Frameworks/Metal.framework/Metal")
    library.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    return bool(library.MTLCreateSystemDefaultDevice())


def path_of_errors() -> Found:
    """Ask for the file of this process's errors, as is done to tell why a process died."""
    from deployments.stderr_tail import stderr_path

    with tempfile.NamedTemporaryFile(prefix="impetus-doctor-") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            found = stderr_path()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        is_same = os.path.realpath(file.name) == os.path.realpath(found)
    return Found("told", "" if is_same else "The system tells another path.", _SEND, WARN)


def footprint() -> Found:
    """Compare this process's memory as the server measures it with the system's number."""
    from scheduler.sensors.process_memory import open_meter

    held = bytearray(64 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    own = open_meter().read() or 0
    if sys.platform == "darwin":
        other = footprint_bytes(told("footprint", "-p", str(os.getpid())))
        other = other or footprint_bytes(told("vmmap", "-summary", str(os.getpid())))
    else:
        other = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = f"{own / MIB:.0f} MiB; the system says {other / MIB:.0f} MiB"
    is_near = own > len(held) and (not other or abs(own - other) < 0.25 * other)
    return Found(value, "" if is_near else "The two differ.", _SEND, WARN)


def footprint_bytes(text: str) -> int:
    """Return the footprint that footprint(1) or vmmap(1) prints, 0 if there is none."""
    match = _FOOTPRINT.search(text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def heat_and_pressure() -> Found:
    """Compare heat and memory pressure as the scheduler reads them with notifyutil and sysctl."""
    from scheduler.sensors.macos import MacSensor

    heat, pressure = told("notifyutil", "-g", _HEAT_KEY), told("sysctl", "-n", _PRESSURE_KEY)
    return compared_levels(MacSensor().read(), heat, pressure)


def compared_levels(own: Reading, heat: str, pressure: str) -> Found:
    """Compare a reading with what notifyutil and sysctl print."""
    from scheduler.sensors.macos import MacSensor

    levels = heat.rpartition(" ")[2], pressure
    value = f"heat {own.thermal.label}, memory {own.memory.label}"
    if not all(level.isdigit() for level in levels):
        return Found(value, "notifyutil or sysctl tells nothing.", _SEND, WARN)
    other = MacSensor(lambda: int(levels[0]), lambda: int(levels[1]), lambda *_: "").read()
    if (own.thermal, own.memory) == (other.thermal, other.memory):
        return Found(value)
    said = f"The system's tools say heat {other.thermal.label}, memory {other.memory.label}."
    return Found(value, said, _SEND, WARN)


PROBES: Mapping[str, Callable[[], Found]] = MappingProxyType(
    {
        "Metal's working set": metal,
        "path of stderr": path_of_errors,
        "memory of a process": footprint,
        "heat and pressure": heat_and_pressure,
    }
)

if __name__ == "__main__":
    print_result(PROBES, sys.argv[1])
