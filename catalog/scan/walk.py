"""Lists the candidate model files in the model folders, with bounds on depth and number."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from catalog.names import is_descriptive
from catalog.scan.identify import passing_reason

MAX_DEPTH = 8
MAX_FILES = 10_000
_UNREADABLE = "cannot be read"
PARTIAL = (".part", ".partial", ".incomplete", ".tmp", ".download", ".crdownload")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A regular file that may be a model, and the model folder that contains it."""

    path: Path
    root: Path


@dataclass(slots=True)
class WalkResult:
    """Candidates ordered by path; `skipped` lists paths with the reason.

    `unread` are the files and folders among them that exist and cannot be read for now.
    """

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)

    def is_unread(self, path: Path) -> bool:
        """Whether a file may be there although it was not found."""
        return any(path == one or path.is_relative_to(one) for one in self.unread)


def walk(roots: Sequence[Path]) -> WalkResult:
    """Collect the regular files under `roots`; blocks while folders are listed.

    A link to a file is followed if its target is inside a root.  Of several names for one file
    the most descriptive is used: the Hugging Face cache links names to hashes.  Linked folders
    and hidden or partial files are ignored.
    """
    found = WalkResult()
    resolved = list(dict.fromkeys(Path(os.path.realpath(root)) for root in roots))
    entries = [
        (entry, root)
        for root in resolved
        if _is_folder(root, found)
        for entry in _entries(root, found)
    ]
    # Of several names for one file the first is used.
    entries.sort(key=lambda item: _descriptive_first(item[0]))
    seen: set[tuple[int, int]] = set()
    for entry, root in entries:
        path = Path(entry.path)
        reason = _exclusion_reason(entry, resolved, seen)
        if reason is None:
            found.candidates.append(Candidate(path, root))
        elif reason:
            found.skipped.append(f"{_printable(path)}: {reason}")
            if reason.startswith(_UNREADABLE):
                found.unread.append(path)
    found.candidates.sort(key=lambda candidate: candidate.path)
    return found


def _is_folder(path: Path, found: WalkResult) -> bool:
    """Whether a folder can be listed; one on a disk that fails costs no other folder its models."""
    try:
        return path.is_dir()
    except OSError as error:
        found.skipped.append(f"{_printable(path)}: cannot be listed ({error.strerror})")
        found.unread.append(path)
        return False


def _descriptive_first(entry: "os.DirEntry[str]") -> tuple[bool, bool, str]:
    return not is_descriptive(entry.name), entry.is_symlink(), entry.path


def _entries(root: Path, found: WalkResult) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a root and its subfolders, except the folders themselves."""
    skipped = found.skipped
    folders = [(root, 1)]
    count = 0
    while folders:
        folder, depth = folders.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(f"{_printable(folder)}: cannot be listed ({error.strerror})")
            if passing_reason(error):
                found.unread.append(folder)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower().endswith(PARTIAL):
                continue
            if _is_subfolder(entry):
                if depth < MAX_DEPTH:
                    folders.append((Path(entry.path), depth + 1))
                else:
                    skipped.append(
                        f"{_printable(Path(entry.path))}: nested deeper than {MAX_DEPTH} folders"
                    )
                continue
            count += 1
            if count > MAX_FILES:
                skipped.append(f"{_printable(root)}: only the first {MAX_FILES:,} files are read")
                return
            yield entry


def _is_subfolder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        # As a file it is skipped with the reason.
        return False


def _exclusion_reason(
    entry: "os.DirEntry[str]", roots: Sequence[Path], seen: set[tuple[int, int]]
) -> str | None:
    """Return why a file is excluded, empty if not worth reporting; None if it is a candidate."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"{_UNREADABLE} ({error.strerror})" if passing_reason(error) else "does not exist"
    if not S_ISREG(status.st_mode):
        return "" if entry.is_symlink() and entry.is_dir() else "not a regular file"
    if entry.is_symlink():
        target = Path(os.path.realpath(entry.path))
        if not any(target.is_relative_to(root) for root in roots):
            return "a link to a file outside the model folders"
    if (status.st_dev, status.st_ino) in seen:
        return "" if status.st_nlink == 1 else "the same file under another name"
    if not _is_utf8(entry.path):
        return "its name is not UTF-8"
    if not os.access(entry.path, os.R_OK):
        return f"{_UNREADABLE} (no permission)"
    seen.add((status.st_dev, status.st_ino))
    return None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")
