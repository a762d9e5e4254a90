"""The shells of this machine by name, and small shell programs."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

POSIX_SHELLS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "dash": ("dash",),
        "bash --posix": ("bash", "--posix"),
        "busybox ash": ("busybox", "ash"),
        "sh": ("sh",),
    }
)


def shell_command(name: str, *options: str) -> list[str]:
    """Return the command of a shell; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return [path, *options]


def write_program(path: Path, *lines: str) -> Path:
    """Write a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return path
