"""What the machine has and how it fares, read from the operating system."""

import sys
from pathlib import Path
from typing import Protocol

import psutil

from core.units import GIB
from scheduler.sensors.linux import LinuxSensor
from scheduler.sensors.macos import MacSensor
from scheduler.sensors.macos_memory import MacLimits
from scheduler.sensors.simulated import FileSensor
from scheduler.thermal import Reading, SensorProblem

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_SMALLEST_MARGIN_BYTES = 2 * GIB


class Sensor(Protocol):
    """Where heat, memory pressure and power are read."""

    def read(self) -> Reading:
        """Return what is known now; what is missing or makes no sense is in its `problems`.

        Blocks while the system answers, so it is called on a thread of its own.
        """
        ...


class NoSensor:
    """A system whose sensors are not known here."""

    def read(self) -> Reading:
        """Return that nothing is known."""
        return Reading(problems=(SensorProblem("thermal", f"none is known on {sys.platform}"),))


def open_sensor(thermal_file: Path | None) -> Sensor:
    """Return this machine's sensor, or the simulated one that reads `thermal_file`."""
    if thermal_file is not None:
        return FileSensor(thermal_file)
    if sys.platform == "darwin":
        return MacSensor()
    return LinuxSensor() if sys.platform == "linux" else NoSensor()


def machine_memory_bytes(cgroup_limits: tuple[Path, ...] = _CGROUP_LIMITS) -> int:
    """Return the RAM this process may use: the machine's, or its cgroup's where that is less."""
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
    """Return what models may use of `total_bytes`: the rest stays for the system and for us.

    `gpu_bytes` is what a Mac's GPU may use of it; unknown, it is taken as three quarters.
    """
    share = int(total_bytes * (0.75 if sys.platform == "darwin" else 0.85))
    most = share if gpu_bytes is None else gpu_bytes
    return max(min(most, total_bytes - _SMALLEST_MARGIN_BYTES), total_bytes // 4)


def gpu_memory_bytes() -> int | None:
    """Return what this machine's GPU may use of the unified memory; None where nothing says."""
    return MacLimits().gpu_bytes() if sys.platform == "darwin" else None
