"""Reads the files of a model on this machine: their paths, sizes and checksums."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.units import MIB
from scripts.models_lib.problems import CommandFailed, WrongUsage

_PIECE_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to send; `path` begins with the model's folder, if it is one."""

    place: Path
    path: str
    size_bytes: int


def files_below(path: Path) -> Sequence[LocalFile]:
    """Return a file, or all files of a folder that are not hidden, by path.

    Links to files are followed, as Hugging Face's cache has them; links to folders are not.
    Raises WrongUsage for a path with nothing to send, CommandFailed if it cannot be read.
    """
    try:
        if path.is_file():
            return [LocalFile(path, path.name, path.stat().st_size)]
        if not path.is_dir():
            raise WrongUsage(f"{str(path)!r} is neither a file nor a folder.")
        found = sorted(_files_in(path), key=lambda file: file.path)
    except OSError as problem:
        raise CommandFailed(f"{problem.filename!r} cannot be read: {problem.strerror}.") from None
    if not found:
        raise WrongUsage(f"{str(path)!r} has no files that are not hidden.")
    return found


def checksum(file: LocalFile, on_read: Callable[[int], None]) -> str:
    """Return a file's SHA-256; `on_read` is told the bytes of each piece.  Raises CommandFailed."""
    digest = hashlib.sha256()
    for piece in pieces(file, 0, _PIECE_BYTES):
        digest.update(piece)
        on_read(len(piece))
    return digest.hexdigest()


def pieces(file: LocalFile, offset: int, size: int) -> Iterator[bytes]:
    """Yield a file's bytes from `offset` on.  Raises CommandFailed if it cannot be read."""
    try:
        with file.place.open("rb") as opened:
            opened.seek(offset)
            while piece := opened.read(size):
                yield piece
    except OSError as problem:
        raise CommandFailed(f"{str(file.place)!r} cannot be read: {problem.strerror}.") from None


def _files_in(folder: Path) -> Iterator[LocalFile]:
    def fail(problem: OSError) -> None:
        raise problem

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(place) / name
            if not name.startswith(".") and file.is_file():
                relative = file.relative_to(folder)
                yield LocalFile(
                    file, (Path(folder.name) / relative).as_posix(), file.stat().st_size
                )
