"""Creates secret tokens as files that only their owner can read."""

import fcntl
import os
import re
import secrets
from pathlib import Path

from core.errors import ImpetusError
from core.files import write_atomically

MANAGEMENT_TOKEN = "management_token"
_TOKEN = re.compile(r"[0-9a-f]{64}")


def key_file(home: Path, name: str) -> Path:
    """Return the file of a secret token under `home`; it is created if missing or damaged.

    The file appears complete or not at all, with mode 0600, so several processes may call this at
    once.  Raises ImpetusError if it cannot be written.
    """
    path = home / "keys" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_valid(path):
            _create(path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as problem:
        raise ImpetusError(
            f"The key file {str(path)!r} cannot be written: {problem.strerror}. Make the folder "
            "writable, or choose another with IMPETUS_HOME."
        ) from problem
    return path


def read_key(home: Path, name: str) -> str:
    """Return the token of `key_file`.  Raises ImpetusError."""
    path = key_file(home, name)
    try:
        return path.read_text().strip()
    except OSError as problem:
        raise ImpetusError(
            f"The key file {str(path)!r} cannot be read: {problem.strerror}."
        ) from problem


def _is_valid(path: Path) -> bool:
    try:
        return _TOKEN.fullmatch(path.read_text(errors="replace").strip()) is not None
    except FileNotFoundError:
        return False


def _create(path: Path) -> None:
    """Create the file; of several processes that do so at once, one wins."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not _is_valid(path):
            write_atomically(path, secrets.token_hex(32).encode())
    finally:
        os.close(folder)
