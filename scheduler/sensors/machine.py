"""Reads the machine's memory and opens its sensors (RAM, cgroup limit, GPU memory, heat)."""

import sys
from pathlib import Path
from typing import Protocol

import psutil

from core.units import GIB
from scheduler.sensors.linux import LinuxSensor
from scheduler.sensors.macos import MacSensor
from scheduler.sensors.macos_memory import MacLimits, mac_memory_bytes
from scheduler.sensors.simulated import FileSensor
from scheduler.thermal import Reading, SensorProblem

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_SMALLEST_MARGIN_BYTES = 2 * GIB
# Of a Mac's memory, what stays for the system and other applications: without it 8 to 24 GB Macs
# freeze or panic under GPU load.  Source: oMLX issues 978 and 1265, vmlx-swift issue 421.
_MAC_RESERVE_BYTES = 4 * GIB
_MAC_RESERVE_SHARE = 0.25
# Of what the GPU may use, what models may: the rest is for buffers and other applications.
_GPU_SHARE = 0.85
# What the GPU may use of a Mac's memory where Metal does not tell: 0.67 on most Macs up to 36 GB.
_UNKNOWN_GPU_SHARE = 0.65


class Sensor(Protocol):
    """Reads heat, memory pressure and power."""

    def read(self) -> Reading:
        """Return a reading; `problems` names what is missing or implausible.

        Blocks while the system answers; call it on its own thread.
        """
        ...


class NoSensor:
    """Stands in on a system whose sensors are not supported."""

    def read(self) -> Reading:
        """Return an empty reading that says why."""
        return Reading(
            problems=(SensorProblem("thermal", f"no sensor is supported on {sys.platform}"),)
        )


def open_sensor(thermal_file: Path | None) -> Sensor:
    """Return this machine's sensor, or a simulated one that reads `thermal_file`."""
    if thermal_file is not None:
        return FileSensor(thermal_file)
    if sys.platform == "darwin":
        return MacSensor()
    return LinuxSensor() if sys.platform == "linux" else NoSensor()


def machine_memory_bytes(cgroup_limits: tuple[Path, ...] = _CGROUP_LIMITS) -> int:
    """Return the RAM this process may use: the machine's, or its cgroup limit if that is lower."""
    if sys.platform == "darwin" and (found := mac_memory_bytes()) is not None:
        return found
    total = int(psutil.virtual_memory().total)
    if sys.platform != "linux":
        return total
    for path in cgroup_limits:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        # cgroup v2 writes `max` for no limit, v1 a number near 2^63.
        if text.isdigit():
            total = min(total, int(text))
    return total


def memory_budget_bytes(total_bytes: int, gpu_bytes: int | None = None) -> int:
    """Return the memory budget for models; the rest stays for the system and the server.

    `gpu_bytes` is what a Mac's GPU may use of it; None: unknown, or no Mac.
    """
    if sys.platform == "darwin":
        return _mac_budget_bytes(total_bytes, gpu_bytes)
    most = min(int(total_bytes * 0.85), total_bytes - _SMALLEST_MARGIN_BYTES)
    return max(most, total_bytes // 4)


def _mac_budget_bytes(total_bytes: int, gpu_bytes: int | None) -> int:
    if gpu_bytes is None:
        gpu_bytes = int(total_bytes * _UNKNOWN_GPU_SHARE)
    reserve = max(_MAC_RESERVE_BYTES, int(total_bytes * _MAC_RESERVE_SHARE))
    return max(min(int(gpu_bytes * _GPU_SHARE), total_bytes - reserve), total_bytes // 4)


def gpu_memory_bytes() -> int | None:
    """Return what this machine's GPU may use of unified memory; None if unknown."""
    return MacLimits().gpu_bytes() if sys.platform == "darwin" else None
