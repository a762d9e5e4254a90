"""Describes the machine: processor, operating system and package versions."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from core.units import format_bytes
from scheduler.sensors.machine import machine_memory_bytes
from scripts.bench_lib.processes import is_supported

BUSY_SHARE = 0.25
PACKAGES = (
    *("impetus", "ray", "uvicorn", "llama-cpp-python", "xllamacpp", "mlx", "mlx-lm", "onnxruntime"),
    *("torch", "transformers", "coremltools"),
)


def describe() -> list[tuple[str, str]]:
    """Return (name, value) pairs for the report."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return [
        ("processor", _processor()),
        ("cores", f"{psutil.cpu_count(logical=False)} physical, {os.cpu_count()} logical"),
        ("memory", format_bytes(machine_memory_bytes())),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("Python", python()),
        ("packages", versions),
        ("llama.cpp in Impetus", _own_system_info()),
        *_not_measured(),
    ]


def _not_measured() -> list[tuple[str, str]]:
    """Return what this system does not tell of processes, for the report."""
    if is_supported():
        return []
    return [("not measured", "CPU time and memory of the servers: only Linux tells them here")]


def python() -> str:
    """Return the interpreter's version, build date and compiler."""
    _, built = platform.python_build()
    return f"{platform.python_version()} ({built}, {platform.python_compiler()})"


def date() -> str:
    """Return the current time, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def load_average() -> str:
    """Return the 1-minute load average, with a note if the machine is busy with other work."""
    load = os.getloadavg()[0]
    is_busy = load > BUSY_SHARE * (os.cpu_count() or 1)
    return f"{load:.2f}" + (", busy: the figures are not to be relied on" if is_busy else "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or "unknown"


def _own_system_info() -> str:
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "could not be asked"
