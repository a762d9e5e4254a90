"""Tells whether anything that a scan reads has changed since the last one, without reading it."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from catalog.models import ScanReport

# A file that changes within one step of the file system's clock has the same time as before.  The
# coarsest, FAT's, has steps of 2 s.
_CLOCK_STEP_S = 2.5


@dataclass(frozen=True, slots=True)
class _State:
    """What the last scan depended on: the folders, their entries, and the catalog."""

    roots: Sequence[Path]
    files: Sequence[Path]
    digest: int
    catalog_version: int
    report: ScanReport


@dataclass(slots=True)
class LastScan:
    """The last scan of a process, for as long as nothing has changed since; for one thread.

    A scan that left files for later, or whose folders changed within the last 2.5 s, is not kept.
    """

    clock: Callable[[], float] = time.time
    _state: _State | None = None
    # The files outside of the listed folders, and the digest at the start of a scan.
    _taken: tuple[Sequence[Path], int] | None = None

    def report(self, roots: Sequence[Path], catalog_version: int) -> ScanReport | None:
        """Return what a scan would report, None if something changed; blocks for a few µs a file.

        `roots` are the folders to scan, `catalog_version` is the catalog's.
        """
        state = self._state
        if state is None or (state.roots, state.catalog_version) != (roots, catalog_version):
            return None
        found = _digest([*state.report.folders], state.files)
        return state.report if found is not None and found[0] == state.digest else None

    def begin(self, folders: Mapping[Path, int], files: Collection[Path]) -> None:
        """Note the state of what was listed, before any of it is read.

        `folders` have their modification times before they were listed, in ns; `files` are those
        outside of them.
        """
        self._state, self._taken = None, None
        if any(_modified_ns(folder) != known for folder, known in folders.items()):
            return
        found = _digest([*folders], [*files])
        if found is not None and found[1] < (self.clock() - _CLOCK_STEP_S) * 1e9:
            self._taken = list(files), found[0]

    def end(self, roots: Sequence[Path], catalog_version: int, report: ScanReport) -> None:
        """Keep the report of a scan that has ended, if nothing was left for later."""
        is_final = report.next_look_s is None and not report.has_unread
        if self._taken is not None and is_final:
            kept = ScanReport(skipped=report.skipped, folders=report.folders)
            self._state = _State(roots, *self._taken, catalog_version, kept)


def _digest(folders: Sequence[Path], files: Sequence[Path]) -> tuple[int, int] | None:
    """Return a hash of all names, sizes, times and inodes, and the latest time in ns.

    None if a folder cannot be listed.
    """
    hashes, newest = [], 0
    try:
        for folder in folders:
            entries = _listing(folder)
            hashes.append(hash(tuple(entries)))
            newest = max(newest, max((entry[2] for entry in entries), default=0))
        for path in files:
            status = os.stat(path)
            hashes.append(hash((status.st_size, status.st_mtime_ns, status.st_ino)))
    except OSError:
        return None
    return hash(tuple(hashes)), newest


def _modified_ns(folder: Path) -> int:
    """Return a folder's modification time in ns, 0 if it is not there."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _listing(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return the entries of a folder, none if it is not there.  Raises OSError."""
    try:
        with os.scandir(folder) as listing:
            return sorted(_entries(listing))
    except FileNotFoundError:
        return []


def _entries(listing: "Iterator[os.DirEntry[str]]") -> Iterator[tuple[str, int, int, int]]:
    """Yield name, size, modification time in ns, and a hash of mode and inodes."""
    for entry in listing:
        own = entry.stat(follow_symlinks=False)
        status = own
        if entry.is_symlink():
            with suppress(OSError):
                status = entry.stat()
        if S_ISDIR(status.st_mode):
            # What is in it is told by its own listing.
            yield entry.name, -1, 0, own.st_ino
        else:
            kind = status.st_mode, status.st_ino, own.st_ino
            yield entry.name, status.st_size, status.st_mtime_ns, hash(kind)
