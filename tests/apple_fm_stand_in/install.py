"""Installs apple-fm-sdk into a cache folder, with stand-ins for the tools of its build."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.apple_fm_stand_in import bindings

_VERSION = "0.2.1"
_TOOLS = {
    # Writes the bindings where they are asked for; the tests bring their own.
    "ctypesgen": 'while [ $# -gt 0 ]; do [ "$1" = "-o" ] && : > "$2"; shift; done',
    "swift": (
        'mkdir -p "$PWD/.built"\n'
        'for end in so dylib; do : > "$PWD/.built/libFoundationModels.$end"; done\n'
        'case "$*" in *--show-bin-path*) echo "$PWD/.built";; esac'
    ),
    "xcode-select": "echo /Applications/Xcode.app/Contents/Developer",
    "xcodebuild": "echo Xcode 26.0",
    "xcrun": "echo 26.0",
}


@contextmanager
def stand_in() -> Iterator[bindings.Model]:
    """Let `import apple_fm_sdk` find the SDK over the stand-in; give the model to script."""
    folder = str(sdk_folder())
    sys.path.insert(0, folder)
    _forget_sdk()
    sys.modules["apple_fm_sdk._ctypes_bindings"] = bindings
    try:
        yield bindings.reset()
    finally:
        gc.collect()
        sys.path.remove(folder)
        _forget_sdk()


def _forget_sdk() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "apple_fm_sdk"]:
        del sys.modules[name]


def sdk_folder() -> Path:
    """Return a folder with the SDK's Python code; skips the test where it cannot be had."""
    folder = Path.home() / ".cache" / "impetus" / f"apple-fm-sdk-{_VERSION}"
    if (folder / "apple_fm_sdk" / "session.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        problem = _install(Path(work))
        if problem:
            pytest.skip(f"apple-fm-sdk {_VERSION} cannot be installed: {problem}")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(work) / "site").rename(folder)
    return folder


def _install(work: Path) -> str:
    """Install below `work`; return why it failed, or nothing."""
    tools = work / "bin"
    tools.mkdir()
    for name, script in _TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", str(work / "site")]
    try:
        done = subprocess.run(
            [*command, f"apple-fm-sdk=={_VERSION}"],
            env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "pip takes too long"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else "pip failed")
