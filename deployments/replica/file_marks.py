"""Detects whether a model's files were replaced or deleted since they were opened."""

import os
from collections.abc import Sequence
from pathlib import Path

from catalog.changes import describe_changes
from core.errors import ModelFileChanged, ModelFileMissing
from deployments.messages import FileMark, LoadRequest


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


def check_unchanged(request: LoadRequest) -> None:
    """Raise ModelFileChanged unless the files are those that were inspected."""
    if describe_changes(request.info.files, request.signatures):
        raise changed_error(request)


def changed_error(request: LoadRequest) -> ModelFileChanged:
    """Return the error of a model whose files changed since they were inspected."""
    change = describe_changes(request.info.files, request.signatures) or "a file changed on disk"
    return ModelFileChanged(
        f"{request.model_id} cannot be loaded now: {change}. It is being inspected again; send the "
        "request again.",
        param="model",
        retry_after_s=1,
    )
