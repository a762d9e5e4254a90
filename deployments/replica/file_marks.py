"""Detects whether a model's files were replaced or deleted since they were opened."""

import os
from collections.abc import Sequence
from pathlib import Path

from core.errors import ModelFileMissing
from deployments.messages import FileMark


def mark(path: Path) -> FileMark:
    """Return the file's current identity.  Raises ModelFileMissing."""
    try:
        status = path.stat()
    except OSError as problem:
        raise ModelFileMissing(f"{path} cannot be read: {problem}", param="model") from problem
    return FileMark(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


def has_changed(marks: Sequence[FileMark]) -> bool:
    """Whether a file was deleted or replaced."""
    for known in marks:
        try:
            status = os.stat(known.path)
        except OSError:
            return True
        now = (status.st_size, status.st_mtime_ns, status.st_ino)
        if now != (known.size_bytes, known.modified_ns, known.inode):
            return True
    return False
