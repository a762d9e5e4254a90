"""A Mac made of fake libraries and programs, on which tests run Python code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fake_library import compile_library

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class FakeMac:
    """Runs code in processes that are told that they run on an Apple silicon Mac."""

    def __init__(self, folder: Path) -> None:
        """Compile the libraries into `folder`; skips the test without a C compiler."""
        self.folder = folder
        (folder / "bin").mkdir()
        for source in HERE.glob("*.c"):
            # Without the C library behind them: functions of Linux are not found there.
            compile_library(folder / f"{source.stem}.so", source.read_text(), "-nostdlib")

    def program(self, name: str, *lines: str) -> None:
        """Add a program, with whatever folder it is called."""
        path = self.folder / "bin" / name
        path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
        path.chmod(0o755)

    def run(self, code: str, **state: object) -> Any:
        """Return what `code` leaves in `result`, which must be JSON; `state` are FAKE_ variables.

        Fails with the error of the process, if there is one.
        """
        values = {f"FAKE_{name.upper()}": str(value) for name, value in state.items()}
        values = {"FAKE_WORKING_SET": str(11453251584), **values}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        printed = f"{code}\nimport json\nprint('\\n' + json.dumps(result))\n"
        done = subprocess.run(
            [sys.executable, "-m", "tests.fake_mac.process", str(self.folder), printed],
            cwd=ROOT,
            env={**os.environ, **values, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
