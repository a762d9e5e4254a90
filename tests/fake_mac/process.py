"""Lets this process act as one on a Mac: the system's name, libraries, programs and packages.

Usage: python -m tests.fake_mac.process FOLDER CODE.  `CODE` runs as on a Mac whose libraries and
programs are in `FOLDER`; other packages that it imports are loaded before, as on this system.
"""

import ast
import ctypes
import fcntl
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

OWN = ("backends", "catalog", "core", "deployments", "router", "scheduler", "scripts")
LIBRARIES = {
    None: "libsystem.so",
    "/usr/lib/libSystem.B.dylib": "libsystem.so",
    "/usr/lib/libproc.dylib": "libsystem.so",
    "/usr/lib/libobjc.A.dylib": "objc.so",
    "/System/Library/Frameworks/Metal.framework/Metal": "metal.so",
    "/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics": "coregraphics.so",
}
# Python's modules have these names on Linux only.
LINUX = {
    "fcntl": ("F_SETPIPE_SZ", "F_GETPIPE_SZ", "F_OFD_SETLK", "F_OFD_SETLKW", "F_ADD_SEALS"),
    "mmap": ("MADV_NOHUGEPAGE", "MADV_HUGEPAGE", "MADV_DONTFORK", "MADV_REMOVE", "MAP_POPULATE"),
    "os": (
        *("copy_file_range", "eventfd", "getrandom", "memfd_create", "pidfd_open"),
        *("posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "splice"),
        *("O_DIRECT", "O_PATH", "O_TMPFILE", "P_PIDFD"),
    ),
    "resource": ("prlimit", "RLIMIT_NICE", "RLIMIT_OFILE", "RLIMIT_RTPRIO", "RLIMIT_SIGPENDING"),
    "select": ("epoll", "EPOLLIN", "EPOLLOUT"),
    "signal": ("SIGRTMIN", "SIGRTMAX", "SIGPOLL", "SIGPWR", "sigtimedwait", "sigwaitinfo"),
    "socket": ("SO_PEERCRED", "SO_DOMAIN", "TCP_KEEPIDLE", "TCP_QUICKACK", "TCP_USER_TIMEOUT"),
    "time": ("CLOCK_BOOTTIME", "pthread_getcpuclockid"),
}
# Source: fcntl.h of macOS.
F_GETPATH, F_FULLFSYNC = 50, 51


def become_mac(folder: Path) -> None:
    """Change this process's modules for good; the Mac's state is in FAKE_ variables."""
    sys.platform = "darwin"
    release = os.environ.get("FAKE_DARWIN", "24.6.0")
    node = os.environ.get("FAKE_NODE", "mac.local")
    uname = os.uname_result(("Darwin", node, release, f"Darwin Kernel Version {release}", "arm64"))
    _replace(os, "uname", lambda: uname)
    for name, value in {
        "machine": "arm64",
        "node": node,
        "system": "Darwin",
        "mac_ver": (os.environ.get("FAKE_MAC_VER", "15.6"), ("", "", ""), "arm64"),
    }.items():
        _replace(platform, name, lambda value=value: value)
    for name, names in LINUX.items():
        module = importlib.import_module(name)
        for each in names:
            if hasattr(module, each):
                delattr(module, each)
    _replace(fcntl, "F_FULLFSYNC", F_FULLFSYNC)
    _replace(fcntl, "fcntl", _fcntl(fcntl.fcntl))
    _replace(ctypes, "CDLL", _libraries(folder))
    _replace(subprocess, "Popen", _programs(folder))


def _replace(module: ModuleType, name: str, value: Any) -> None:
    setattr(module, name, value)


def _libraries(folder: Path) -> type[ctypes.CDLL]:
    class MacLibrary(ctypes.CDLL):
        def __init__(self, name: str | None, *arguments: Any, **options: Any) -> None:
            if name is not None and Path(name).is_relative_to(folder):
                path = name
            elif name in LIBRARIES:
                path = str(folder / LIBRARIES[name])
            else:
                raise OSError(f"dlopen({name}): no such file")
            super().__init__(path, *arguments, **options)

    return MacLibrary


def _programs(folder: Path) -> type["subprocess.Popen[Any]"]:
    class MacProcess(subprocess.Popen[Any]):
        def __init__(self, command: Any, *arguments: Any, **options: Any) -> None:
            first = command if isinstance(command, str) else command[0]
            fake = folder / "bin" / Path(first).name
            if fake.is_file():
                command = [str(fake), *command[1:]]
            elif str(first).startswith(("/usr/bin/", "/usr/sbin/", "/sbin/")):
                raise FileNotFoundError(f"{first} is not on this Mac")
            super().__init__(command, *arguments, **options)

    return MacProcess


def _fcntl(usual: Any) -> Any:
    def answer(descriptor: Any, command: int, argument: Any = 0) -> Any:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if command == F_GETPATH:
            # Python's own limit is the longest path of macOS, too.
            assert len(argument) == 1024
            return os.fsencode(os.readlink(f"/proc/self/fd/{number}")).ljust(1024, b"\0")
        if command == F_FULLFSYNC:
            os.fsync(number)
            return 0
        return usual(descriptor, command, argument)

    return answer


class _Without:
    """A finder of modules that does not find some packages."""

    def __init__(self, finder: Any, hidden: frozenset[str]) -> None:
        self._finder = finder
        self._hidden = hidden

    def find_spec(self, name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] in self._hidden:
            return None
        return self._finder.find_spec(name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(packages: frozenset[str]) -> None:
    """Make packages appear not to be installed."""
    assert not packages & set(sys.modules)
    sys.meta_path[:] = [_Without(finder, packages) for finder in sys.meta_path]


def load_others(code: str) -> None:
    """Import what `code` imports as on this system, and forget the project's modules again."""
    for node in ast.walk(ast.parse(code)):
        names: Sequence[str] = ()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (node.module,)
        elif isinstance(node, ast.Import):
            names = tuple(alias.name for alias in node.names)
        for name in names:
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]


if __name__ == "__main__":
    hide(frozenset(os.environ.get("FAKE_ABSENT", "").split(",")) - {""})
    load_others(sys.argv[2])
    become_mac(Path(sys.argv[1]))
    exec(compile(sys.argv[2], "on a Mac", "exec"), {"__name__": "mac"})
