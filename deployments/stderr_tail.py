"""Reads the last lines that a dead process wrote to stderr."""

import fcntl
import logging
import os
import re
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST_BYTES = 16_384
_MOST_LINES = 6
_LONGEST_LINE = 200
# Source: fcntl.h of macOS; the path is at most MAXPATHLEN bytes.
_F_GETPATH = 50
_MAX_PATH = 1024
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def stderr_path() -> str:
    """Return the file that this process's stderr goes to; empty if it is not a file."""
    try:
        if sys.platform == "darwin":
            found = fcntl.fcntl(2, _F_GETPATH, bytes(_MAX_PATH)).rstrip(b"\0").decode()
        else:
            found = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return found if Path(found).is_file() else ""


def read_stderr_tail(path: str) -> str:
    """Return the last lines of a file, joined by ` / `; empty if there are none."""
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST_BYTES))
            text = file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError as problem:
        logger.info("cannot read the log of a dead process: %s", problem)
        return ""
    lines = [_cleaned(line) for line in text.splitlines()]
    return " / ".join([line for line in lines if line][-_MOST_LINES:])


def _cleaned(line: str) -> str:
    """Return a line without escape sequences and control characters."""
    shown = _ESCAPES.sub("", line).strip()
    return "".join(char for char in shown if char.isprintable())[:_LONGEST_LINE]
