"""Folders in the user's cache for models that tests build once."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNUSED_S = 3 * 24 * 3600


def cache_folder(kind: str, digest: str) -> Path:
    """Return the folder of one state of what `kind` is built from; makes it.

    Folders of other states are removed once nobody has used them for three days.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "impetus" / kind / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in folder.parent.iterdir():
        if time.time() - other.stat().st_mtime > _UNUSED_S:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a path's lock over all processes; waits while another builds it."""
    with path.with_name(f".{path.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
