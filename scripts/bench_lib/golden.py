"""Provides the models that the tests build, for formats other than the starter's."""

import subprocess
import sys
from pathlib import Path

from scripts.bench_lib.section import Choices
from scripts.bench_lib.servers import ROOT, BenchError


def model_folder(kind: str, choices: Choices) -> Path:
    """Return a golden model's folder; builds it if missing.  Raises BenchError."""
    if choices.golden is not None:
        folder = choices.golden / kind
        if not folder.is_dir():
            raise BenchError(f"there is no model {folder}; leave out --golden to build it")
        return folder.resolve()
    # In a subprocess, because the converters would stay in this process's memory.
    code = "import sys; from tests.golden import golden; print(golden(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, kind], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"the golden model {kind} could not be built:\n{done.stderr[-2000:]}")
    return Path(done.stdout.splitlines()[-1])
