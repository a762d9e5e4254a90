"""A process that computes beside the servers, as a compiler would."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy with a process of this one's priority until left."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
