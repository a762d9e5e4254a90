"""Lists local folders to choose models from: only below certain folders, never through links out.

All functions block, on a network disk that does not answer for ever: call them in a thread with a
limit of time.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from catalog.scan.places import model_folders
from core.errors import NotFound, PermissionDenied, RequestError
from core.files import why
from core.settings import Settings

MAX_ENTRIES = 2000
# Of a folder with more, such as a mail box, the rest is not looked at.
_MAX_READ = 20_000
_LONGEST_PATH = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder or a regular file; `modified` is in Unix seconds, sizes of folders are 0."""

    name: str
    path: str
    is_folder: bool
    size_bytes: int
    modified: float


@dataclass(frozen=True, slots=True)
class Listing:
    """What is in a folder, folders first; `parent` is empty if it may not be listed."""

    path: str
    parent: str
    entries: tuple[Entry, ...]
    is_truncated: bool


def roots(settings: Settings) -> list[Path]:
    """Return the folders below which everything may be listed and imported."""
    chosen = settings.browse_path
    if chosen is None:
        try:
            chosen = [Path.home() / "Downloads", Path.home() / "Models"]
        except RuntimeError:
            chosen = []
    return list(dict.fromkeys([*chosen, *model_folders(settings)]))


def allowed(path: str, roots: Sequence[Path]) -> Path:
    """Return a path without links.

    Raises RequestError for one that is not absolute, PermissionDenied for one that is not below a
    root, before anything but its own and the roots' names is looked at, and NotFound.
    """
    if "\0" in path or len(path) > _LONGEST_PATH or not path.startswith("/"):
        raise RequestError(
            f"{path[:80]!r} is not an absolute path, such as /Volumes/Disk/Models.", param="path"
        )
    try:
        real = os.path.realpath(path)
        is_inside = any(_is_below(real, root) for root in _nearest_first(path, roots))
        # Of what is elsewhere not even the existence is told.
        if not is_inside:
            raise PermissionDenied(
                f"{path[:200]!r} is in none of the folders that may be looked at; add its folder "
                "to IMPETUS_BROWSE_PATH and restart the server.",
                param="path",
            )
        os.lstat(real)
    except (OSError, ValueError) as problem:
        reason = why(problem) if isinstance(problem, OSError) else str(problem)
        raise NotFound(f"{path[:200]!r} cannot be looked at: {reason}.", param="path") from problem
    return Path(real)


def _nearest_first(path: str, roots: Sequence[Path]) -> list[Path]:
    """Put the roots that are around a path first: the disks of others may not answer."""
    return sorted(roots, key=lambda root: not Path(path).is_relative_to(root))


def _is_below(real: str, root: Path) -> bool:
    with suppress(OSError):
        return Path(real).is_relative_to(os.path.realpath(root))
    return False


def browse(path: str, roots: Sequence[Path]) -> Listing:
    """Return what is in a folder.  Raises RequestError, PermissionDenied, NotFound."""
    real = allowed(path, roots)
    try:
        if not stat.S_ISDIR(os.lstat(real).st_mode):
            raise RequestError(f"{path[:200]!r} is not a folder.", param="path")
        entries = sorted(
            _entries(real, roots), key=lambda one: (not one.is_folder, one.name.casefold())
        )
    except PermissionError as problem:
        raise PermissionDenied(
            f"{path[:200]!r} cannot be listed: {why(problem)}; make it readable, on a Mac also in "
            "System Settings, Privacy & Security, Files and Folders.",
            param="path",
        ) from problem
    except OSError as problem:
        raise NotFound(
            f"{path[:200]!r} cannot be listed: {why(problem)}.", param="path"
        ) from problem
    parent = str(real.parent)
    has_parent = any(_is_below(parent, root) for root in _nearest_first(parent, roots))
    return Listing(
        str(real),
        parent if has_parent else "",
        tuple(entries[:MAX_ENTRIES]),
        len(entries) > MAX_ENTRIES,
    )


def browse_root(root: Path) -> Entry | None:
    """Return a root as an entry, None if it is not a folder."""
    try:
        status = os.stat(root)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return None
    return Entry(root.name or str(root), str(root), True, 0, status.st_mtime)


def _entries(folder: Path, roots: Sequence[Path]) -> Iterator[Entry]:
    """Yield folders and regular files that are not hidden; links only if they stay inside."""
    with os.scandir(folder) as listing:
        for count, entry in enumerate(listing):
            if count >= _MAX_READ:
                return
            if entry.name.startswith(".") or not _is_utf8(entry.name):
                continue
            with suppress(OSError):
                if entry.is_symlink() and not _stays_inside(entry.path, roots):
                    continue
                status = entry.stat()
                is_folder = stat.S_ISDIR(status.st_mode)
                if is_folder or stat.S_ISREG(status.st_mode):
                    size = 0 if is_folder else status.st_size
                    yield Entry(entry.name, entry.path, is_folder, size, status.st_mtime)


def _stays_inside(path: str, roots: Sequence[Path]) -> bool:
    real = os.path.realpath(path)
    return any(_is_below(real, root) for root in _nearest_first(real, roots))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
