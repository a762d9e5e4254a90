"""Compiles small shared libraries that stand in for those of macOS in real ctypes calls."""

import shutil
import subprocess
from pathlib import Path

import pytest


def compile_library(path: Path, source: str, *options: str) -> Path:
    """Compile C `source` into the shared library `path`; skip the test without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    command = [compiler, "-shared", "-fPIC", "-w", *options, "-x", "c", "-o", str(path), "-"]
    subprocess.run(command, input=source.encode(), check=True, timeout=60)
    return path
