"""Copies a model into the data folder, by a clone where the file system shares blocks."""

import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from catalog.scan.packages import model_stem
from catalog.uploads.names import MAX_PARTS, checked_path, is_junk, same_name, unusable
from catalog.uploads.store import require_space
from core.errors import ImpetusError, InsufficientDisk, RequestError, Unavailable
from core.files import flush_path, open_regular, why
from core.units import MIB

MAX_FILES = 10_000
_PIECE_BYTES = 8 * MIB
# Source: Linux's linux/fs.h, _IOW(0x94, 9, int).
_FICLONE = 0x40049409
# Source: clonefile(2) of macOS and ioctl_ficlone(2) of Linux: what says that cloning is impossible.
_NO_CLONE = frozenset({
    errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL, errno.ENOSYS,
    errno.EPERM, errno.ETXTBSY,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to copy: where it is, its path in the model's folder, and what it was when listed."""

    source: Path
    path: str
    size_bytes: int
    modified_ns: int


def files_of(source: Path, roots: Iterable[Path]) -> list[SourceFile]:
    """Return the files of a model: all of a folder, or a file with its shards; blocks.

    A link to a file is followed if its target is below a root; links to folders, pipes and devices
    are left out, as hidden files are.  Raises RequestError.
    """
    real_roots = [Path(os.path.realpath(root)) for root in roots]
    found: list[SourceFile] = []
    names: dict[str, str] = {}
    for path in _paths(source):
        file = _source_file(path, source, real_roots)
        if file is None:
            continue
        clash = names.setdefault(same_name(file.path), file.path)
        if clash != file.path:
            raise RequestError(
                f"{clash!r} and {file.path!r} have the same name on some disks; rename one.",
                param="path",
            )
        found.append(file)
        if len(found) > MAX_FILES:
            raise RequestError(
                f"{source} has more than {MAX_FILES:,} files; choose the folder of one model.",
                param="path",
            )
    if not found:
        raise RequestError(f"There is no file to import in {source}.", param="path")
    return found


def _paths(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        stem = model_stem(source)
        siblings = [path for path in source.parent.iterdir() if model_stem(path) == stem]
        yield from sorted(siblings) or [source]
        return
    for parent, folders, names in os.walk(source):
        folders[:] = [name for name in sorted(folders) if not is_junk(name)]
        if len(Path(parent).relative_to(source).parts) >= MAX_PARTS - 1:
            folders.clear()
        yield from (Path(parent, name) for name in sorted(names))


def _source_file(path: Path, source: Path, roots: list[Path]) -> SourceFile | None:
    base = source if path != source and path.is_relative_to(source) else source.parent
    name = checked_path(str(path.relative_to(base)))
    if is_junk(name) or unusable(name):
        return None
    try:
        target = Path(os.path.realpath(path))
        status = os.stat(target)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    if path.is_symlink() and not any(target.is_relative_to(root) for root in roots):
        raise RequestError(
            f"{path} is a link to {target}, which is in none of the folders that may be imported "
            "from; add its folder to IMPETUS_BROWSE_PATH.",
            param="path",
        )
    return SourceFile(target, name, status.st_size, status.st_mtime_ns)


def copy_files(
    files: Iterable[SourceFile],
    folder: Path,
    *,
    may_clone: bool,
    add: Callable[[int], None],
) -> None:
    """Copy or clone files into `folder`; `add` is told of each number of bytes; blocks.

    Files that an earlier run copied are left.  Raises InsufficientDisk before the first byte,
    RequestError for a file that changes meanwhile, Unavailable and ImpetusError for the disks.
    """
    files = list(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        left = [file for file in files if not _is_copied(file, folder / file.path)]
        add(sum(file.size_bytes for file in files) - sum(file.size_bytes for file in left))
        clones = may_clone and _clones(left, folder)
        if not clones:
            require_space(folder, sum(file.size_bytes for file in left), 0, "The copy")
        for file in left:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_one(file, target, add if not clones else None)
            if clones:
                add(file.size_bytes)
    except OSError as problem:
        raise _disk(problem) from problem


def _is_copied(file: SourceFile, target: Path) -> bool:
    try:
        status = target.lstat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size_bytes, file.modified_ns)


def _clones(files: list[SourceFile], folder: Path) -> bool:
    """Whether the largest file can be cloned into `folder`, so that no room is needed."""
    if not files:
        return False
    trial = folder / ".clone"
    with suppress(FileNotFoundError):
        trial.unlink()
    try:
        return clone_file(max(files, key=lambda file: file.size_bytes).source, trial)
    finally:
        with suppress(FileNotFoundError):
            trial.unlink()


def _copy_one(file: SourceFile, target: Path, add: Callable[[int], None] | None) -> None:
    """Clone a file, or copy it if `add` is given or it cannot be cloned; complete or absent."""
    partial = target.with_name(".copying")
    with suppress(FileNotFoundError):
        partial.unlink()
    if add is not None or not clone_file(file.source, partial):
        _copy_bytes(file.source, partial, add or (lambda _: None))
    now, copied = os.stat(file.source), partial.lstat().st_size
    if (now.st_size, now.st_mtime_ns, copied) != (
        file.size_bytes,
        file.modified_ns,
        file.size_bytes,
    ):
        partial.unlink()
        raise RequestError(
            f"{file.source} changed while it was copied; import it again when it is complete.",
            param="path",
        )
    partial.chmod(0o644)
    os.utime(partial, ns=(file.modified_ns, file.modified_ns))
    flush_path(partial)
    partial.rename(target)


def _copy_bytes(source: Path, target: Path, add: Callable[[int], None]) -> None:
    with open_regular(source) as reader, target.open("xb") as writer:
        while piece := reader.read(_PIECE_BYTES):
            writer.write(piece)
            add(len(piece))


def clone_file(source: Path, target: Path) -> bool:
    """Make `target` share the blocks of `source`; False, and no target, where that is impossible.

    Raises OSError for other failures.
    """
    try:
        if sys.platform == "darwin":
            _clonefile(source, target)
        else:
            with open_regular(source) as reader, target.open("xb") as writer:
                fcntl.ioctl(writer, _FICLONE, reader.fileno())
    except OSError as problem:
        if problem.errno not in _NO_CLONE:
            raise
        with suppress(FileNotFoundError):
            target.unlink()
        return False
    return True


def _clonefile(source: Path, target: Path) -> None:
    """Call clonefile(2) of macOS's system library.  Raises OSError."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if library.clonefile(os.fsencode(source), os.fsencode(target), 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source))


def move_folder(source: Path, target: Path) -> None:
    """Make a folder visible as `target` by one rename; blocks.

    Across disks it is copied beside the target first.  Raises OSError, InsufficientDisk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for parent, _, _ in os.walk(source):
        flush_path(Path(parent))
    try:
        source.rename(target)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.arriving")
        shutil.rmtree(beside, ignore_errors=True)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        require_space(target.parent, size, 0, "The model")
        shutil.copytree(source, beside, symlinks=True)
        beside.rename(target)
        shutil.rmtree(source, ignore_errors=True)
    flush_path(target.parent)


def _disk(problem: OSError) -> ImpetusError:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientDisk(f"The model cannot be copied: {why(problem)}.")
    if problem.errno == errno.ENOENT:
        return RequestError(f"{problem.filename} is not there any more.", param="path")
    return Unavailable(f"The model cannot be copied: {why(problem)}.", retry_after_s=60)
