"""Reads a process's memory footprint on Linux and macOS, and returns freed memory to the system."""

import ctypes
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from core.process_memory import (
    footprint_bytes,
    footprint_of,
    model_processes,
    process_rusage,
)
from core.units import KIB

_STATUS = Path("/proc/self/status")
_LINE = re.compile(r"^(RssAnon|RssFile|VmSwap):\s+(\d{1,15}) kB$", re.MULTILINE)


class Meter(Protocol):
    """Reads the memory of this process and of its children that hold models."""

    def read(self) -> int | None:
        """Return the bytes they hold; None if the system does not tell."""
        ...


class LinuxMeter:
    """Counts anonymous, swapped and mapped file pages; not shared memory (Ray's object store)."""

    def __init__(self, status: Path = _STATUS) -> None:
        self._status = status

    def read(self) -> int | None:
        """Return the sum from `/proc/self/status`.  Source: proc_pid_status(5)."""
        own = _status_bytes(self._status)
        if own is None:
            return None
        children = (_status_bytes(Path(f"/proc/{pid}/status")) for pid in model_processes())
        return own + sum(held for held in children if held)


def _status_bytes(status: Path) -> int | None:
    try:
        found = dict(_LINE.findall(status.read_text()))
    except OSError:
        return None
    if not {"RssAnon", "RssFile"} <= found.keys():
        return None
    return sum(map(int, found.values())) * KIB


class MacMeter:
    """Reads the physical footprint, as Activity Monitor shows it, Metal's buffers included."""

    def __init__(self, rusage: Callable[[], bytes] | None = None) -> None:
        self._rusage = rusage or (lambda: process_rusage(os.getpid()))

    def read(self) -> int | None:
        """Return the sum of `ri_phys_footprint`."""
        try:
            own = footprint_of(self._rusage())
        except (OSError, AttributeError):
            return None
        if own is None:
            return None
        return own + sum(footprint_bytes(pid) or 0 for pid in model_processes())


class NoMeter:
    """Stands in on a system that is not supported."""

    def read(self) -> int | None:
        """Return None."""
        return None


def open_meter() -> Meter:
    """Return this machine's meter."""
    if sys.platform == "darwin":
        return MacMeter()
    return LinuxMeter() if sys.platform == "linux" else NoMeter()


def trim_heap() -> None:
    """Ask the C library to return free heap to the system; blocks for milliseconds.

    Source: malloc_trim(3) of glibc, malloc_zone_pressure_relief of macOS' malloc/malloc.h.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    elif hasattr(library, "malloc_zone_pressure_relief"):
        library.malloc_zone_pressure_relief(None, ctypes.c_size_t(0))
