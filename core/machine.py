"""Identifies this machine: macOS' release and build, and an id that its name does not change."""

import ctypes
import hashlib
import os
import sys
from functools import cache
from pathlib import Path

_LIBRARY = "/usr/lib/libSystem.B.dylib"
# Of the machine; of this start of the kernel, which containers see too.
_LINUX_IDS = (Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id"))
_UUID_BYTES = 16
_ID_DIGITS = 16
_BUILD_BYTES = 64


class _Timespec(ctypes.Structure):
    # Source: sys/_types/_timespec.h of macOS, 64 bits.
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def macos_release() -> int:
    """Return the major version of macOS, such as 15 or 26; 0 on other systems.

    From Darwin's release: a Python that was built with an SDK before macOS 26 reads 16 from
    `platform.mac_ver()` there.  Source: python/cpython issue 135675.
    """
    return macos_release_of(os.uname().release) if sys.platform == "darwin" else 0


def macos_release_of(darwin: str) -> int:
    """Return the version of macOS for the release of its kernel; 0 if it is not known.

    Source: Darwin 20 to 24 are macOS 11 to 15, Darwin 25 is macOS 26.
    """
    major = darwin.partition(".")[0]
    if not major.isdigit() or int(major) < 20:
        return 0
    return int(major) + (1 if int(major) >= 25 else -9)


def macos_build() -> str:
    """Return the build of macOS, such as 24E248; without one, a hash of the kernel's version.

    It changes with every update, also with those that keep the version's number.
    Source: sysctlbyname(3), kern.osversion.
    """
    buffer = ctypes.create_string_buffer(_BUILD_BYTES)
    size = ctypes.c_size_t(_BUILD_BYTES)
    try:
        status = ctypes.CDLL(_LIBRARY).sysctlbyname(
            b"kern.osversion", buffer, ctypes.byref(size), None, ctypes.c_size_t(0)
        )
    except (OSError, AttributeError):
        status = -1
    found = "" if status else buffer.value.decode("ascii", "replace")
    return found if found.isalnum() else hashlib.sha256(os.uname().version.encode()).hexdigest()[:8]


@cache
def machine_id() -> str:
    """Return 16 hexadecimal digits that are the same in every process of this machine.

    The machine's name may change with its network; this does not.  "local" if the system tells
    nothing.
    """
    found = _mac_id() if sys.platform == "darwin" else _linux_id(_LINUX_IDS)
    # Hashed: the id itself names the machine to others.
    return hashlib.sha256(b"impetus " + found).hexdigest()[:_ID_DIGITS] if found else "local"


def _linux_id(files: tuple[Path, ...]) -> bytes:
    for file in files:
        try:
            text = file.read_bytes().strip()
        except OSError:
            continue
        if len(text) >= 2 * _UUID_BYTES:
            return text
    return b""


def _mac_id(library: str = _LIBRARY) -> bytes:
    """Return the machine's UUID; empty if macOS does not tell.  Source: gethostuuid(2)."""
    uuid = ctypes.create_string_buffer(_UUID_BYTES)
    limit = _Timespec(1, 0)
    try:
        if ctypes.CDLL(library).gethostuuid(uuid, ctypes.byref(limit)):
            return b""
    except (OSError, AttributeError):
        return b""
    return uuid.raw if any(uuid.raw) else b""
