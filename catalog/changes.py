"""Describes how a model's files differ from what was read of them before, or from another's."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from core.files import open_regular
from core.units import KIB, format_bytes

_SAMPLES = 64
_LEAST_SAMPLES = 4
_SAMPLE_BYTES = 16 * KIB


def file_signature(path: Path) -> str:
    """Return size, modification time and inode as text, to detect changes.  Raises OSError."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def content_digest(files: Sequence[Path]) -> str:
    """Return a digest of the files' sizes and of samples of their content, in order.

    Files of the same digest are the same for all but those who mean to deceive: at least 64 pieces
    of 16 KiB, spread over all files, are read, and small files as a whole.  Raises OSError.
    """
    digest = hashlib.sha256()
    samples = max(_SAMPLES // max(len(files), 1), _LEAST_SAMPLES)
    for path in files:
        with open_regular(Path(os.path.realpath(path))) as file:
            size = file.seek(0, 2)
            digest.update(f"{size}:".encode())
            last, is_small = size - _SAMPLE_BYTES, size <= samples * _SAMPLE_BYTES
            places = (
                list(range(0, size, _SAMPLE_BYTES))
                if is_small
                else [last * number // (samples - 1) for number in range(samples)]
            )
            for place in places:
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def describe_changes(files: Sequence[Path], signatures: Sequence[str]) -> str:
    """Return what happened to the first file whose signature is another one; empty if none."""
    for path, known in zip(files, signatures, strict=False):
        try:
            now = file_signature(path)
        except OSError as problem:
            return f"the file {path} cannot be read any more ({problem.strerror})"
        if now != known:
            return describe_change(path, size_of(known), size_of(now))
    return ""


def describe_change(path: Path, known_bytes: int, bytes_now: int) -> str:
    """Return what happened to a file, with its sizes before and now."""
    what = f"the file {path} changed on disk"
    if known_bytes == bytes_now:
        return f"{what}; its size is the same, {_size(bytes_now)}"
    verb = "was truncated" if bytes_now < known_bytes else "grew"
    return f"{what}: it {verb} from {_size(known_bytes)} to {_size(bytes_now)}"


def size_of(known: str) -> int:
    """Return the bytes of a file from its signature; 0 if that cannot be read."""
    size, _, _ = known.partition("-")
    return int(size) if size.isdecimal() else 0


def _size(count: int) -> str:
    return f"{format_bytes(count)} ({count:,} bytes)"
