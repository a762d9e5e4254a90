"""Names the calling thread for ps and top, and counts the performance cores."""

import contextlib
import ctypes
import subprocess
import sys

import psutil

from core.cpus import usable_cpus

_PR_SET_NAME = 15
# Once: both systems have pthread_setname_np, with other arguments.
_SYSTEM = sys.platform


def name_this_thread(name: str) -> None:
    """Name the calling thread as ps and top show it; at most 15 bytes are kept.  Never raises.

    Source: prctl(2) on Linux, pthread_setname_np(3) on macOS.
    """
    # A thread without a name does its work all the same.
    with contextlib.suppress(Exception):
        encoded = name.encode()[:15]
        # The process itself: to look for the library would start other processes.
        libc = ctypes.CDLL(None)
        if _SYSTEM == "darwin":
            libc.pthread_setname_np(encoded)
        elif _SYSTEM == "linux":
            libc.prctl(_PR_SET_NAME, encoded, 0, 0, 0)


def performance_cores() -> int:
    """Return how many performance cores this process may use; blocks a few ms on macOS."""
    if sys.platform == "darwin":
        # Source: sysctl(3), hw.perflevel0 is the fastest cluster of Apple Silicon.
        answer = subprocess.run(
            ["sysctl", "-n", "hw.perflevel0.physicalcpu"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0 and answer.stdout.strip().isdigit():
            return int(answer.stdout)
    return min(psutil.cpu_count(logical=False) or 1, usable_cpus())
