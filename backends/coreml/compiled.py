"""Where compiled Core ML models are kept, under which names, and which are deleted.

An entry is a folder `NAME.mlmodelc` and a file `NAME.json`, which tells the package that it was
compiled from.  The name has the content of the package and the build of macOS.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO

from backends.coreml.compile import PARTIAL
from backends.coreml.spec import CoremlSpec
from core.files import open_regular, why, write_atomically
from core.machine import macos_build
from core.parent import is_running
from core.units import GIB

logger = logging.getLogger(__name__)

# Deletes the entries that were used longest ago; the one in use stays, whatever its size.
_MOST_BYTES = 32 * GIB
_MOST_NOTE_BYTES = 64 * 1024
_SUFFIX = ".mlmodelc"
# Raise it when entries are made otherwise than before.
_VERSION = 1


@dataclass(slots=True)
class CompiledPlace:
    """The place of one model's compiled form, which is not deleted before `close`."""

    path: Path
    _note: IO[bytes]

    def close(self) -> None:
        """Allow the deletion; idempotent."""
        self._note.close()


def open_place(folder: Path, spec: CoremlSpec) -> CompiledPlace | None:
    """Return where the compiled form of a model is, or is to be written; deletes other entries.

    Reads all files of the model, once in a process.  None, with a message in the log, if the
    folder cannot be used.  Raises OSError if the model's files cannot be read.
    """
    name = f"{_content(spec)[:32]}-{macos_build()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / f"{name}.json", spec.package)
        try:
            _delete_others(folder, folder / f"{name}.json", spec.package)
        except BaseException:
            file.close()
            raise
    except OSError as problem:
        logger.warning("compiled Core ML models are not kept: %s", why(problem))
        return None
    return CompiledPlace(folder / (name + _SUFFIX), file)


def _locked(note: Path, package: Path) -> IO[bytes]:
    """Return the note of an entry, which it makes or marks as used now, with a shared lock."""
    made_from = _package_of(note)
    if made_from is not None and (made_from == package or made_from.exists()):
        # The one that another load has locked, of this package or of a copy of it.
        os.utime(note)
    else:
        write_atomically(note, json.dumps(str(package)).encode("ascii"), is_durable=False)
    file = note.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def _content(spec: CoremlSpec) -> str:
    """Return a hash of all files of a package, with their names."""
    root = spec.package if spec.package.is_dir() else spec.package.parent
    parts = [f"{_VERSION} {spec.default_function}"]
    for path in sorted(spec.files):
        status = path.stat()
        marks = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        parts.append(f"{path.relative_to(root)} {_file_hash(path, marks)}")
    return sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


@lru_cache(maxsize=1024)
def _file_hash(path: Path, marks: tuple[int, ...]) -> str:
    del marks
    # Hugging Face's cache has links to files.
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _delete_others(folder: Path, own: Path, package: Path) -> None:
    """Delete unfinished work, entries that are of no use any more, and the oldest ones."""
    _delete_unfinished(folder)
    build = own.stem.rpartition("-")[2]
    kept: list[tuple[int, Path, int]] = []
    for note in folder.glob("*.json"):
        if note == own:
            continue
        made_from = _package_of(note)
        is_useless = made_from is None or made_from == package or not made_from.exists()
        if is_useless or not note.stem.endswith(f"-{build}"):
            _delete(note)
        else:
            kept.append((note.stat().st_mtime_ns, note, _size(note)))
    total = _size(own) + sum(size for _, _, size in kept)
    for _, note, size in sorted(kept):
        if total <= _MOST_BYTES:
            break
        if _delete(note):
            total -= size


def _delete_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{PARTIAL}*"):
        process = path.name.removeprefix(PARTIAL).partition("-")[0]
        if process.isdecimal() and not is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{_SUFFIX}"):
        if not path.with_suffix(".json").is_file():
            shutil.rmtree(path, ignore_errors=True)


def _package_of(note: Path) -> Path | None:
    try:
        with open_regular(note) as file:
            found = json.loads(file.read(_MOST_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return Path(found) if isinstance(found, str) and "\0" not in found else None


def _size(note: Path) -> int:
    return sum(path.stat().st_size for path in _files(note.with_suffix(_SUFFIX)))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _delete(note: Path) -> bool:
    """Delete an entry unless a process has it open; return whether it is gone."""
    with suppress(FileNotFoundError), note.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(note.with_suffix(_SUFFIX), ignore_errors=True)
        note.unlink()
    return True
