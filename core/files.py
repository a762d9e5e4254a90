"""Atomic file writes, locks, safe opening of files that others may have replaced, disk errors."""

import errno
import fcntl
import os
import stat
import sys
import tempfile
import time
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

_ZEROS = bytes(1 << 16)
_LOCK_POLL_S = 0.01
# The process or the machine is short of something for the moment; the file itself is fine.
_SHORTAGES = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ENOBUFS,
})  # fmt: skip
_PASSING = _SHORTAGES | {
    errno.EACCES, errno.EBUSY, errno.EDQUOT, errno.EHOSTDOWN, errno.EIO, errno.ENODEV,
    errno.ENOSPC, errno.ENOTCONN, errno.ENXIO, errno.EPERM, errno.EROFS, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the limit of file sizes",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reported an error",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
    errno.EMFILE: "this process has too many open files",
    errno.ENFILE: "the machine has too many open files",
}


class NotARegularFile(OSError):
    """The path is a folder, a link, a pipe or a device."""


def is_shortage(problem: OSError) -> bool:
    """Whether the error says nothing of the file: too many open files, too little memory."""
    return problem.errno in _SHORTAGES


def passing_cause(problem: BaseException) -> OSError | None:
    """Return the system's error behind an exception, if it says nothing of the file's content."""
    seen: set[int] = set()
    cause: BaseException | None = problem
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def why(problem: OSError) -> str:
    """Return what went wrong on disk, in words that a user understands."""
    known = _REASONS.get(problem.errno or 0)
    text = problem.strerror or str(problem) or type(problem).__name__
    return f"{known} ({text})" if known else text


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; never waits for a pipe's writer, never follows a link.

    Raises NotARegularFile, OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO, errno.EOPNOTSUPP):
            raise NotARegularFile(problem.errno, "it is not a regular file", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotARegularFile(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files in `folder` that match a glob pattern, in order, without hidden ones.

    macOS writes a hidden file `._name` beside each file on drives without extended attributes
    (exFAT, SMB) and in archives: it looks like a weight file by its suffix and is none.
    """
    found = folder.glob(pattern)
    return sorted(path for path in found if not path.name.startswith(".") and path.is_file())


def lock_file(file: IO[Any], limit_s: float) -> None:
    """Lock an open file until it is closed; waits while another process holds the lock.

    Raises BlockingIOError after `limit_s`: a process that hangs must not hang the others.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    errno.EAGAIN, f"another process has kept it locked for {limit_s:.0f} s; stop it"
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            return


def write_atomically(
    path: Path,
    *parts: bytes | memoryview,
    mode: int = 0o600,
    scratch: Path | None = None,
    is_durable: bool = True,
) -> None:
    """Write `parts` to a temporary file beside `path`, and rename it to `path`; blocks.

    `path` is complete or unchanged, whatever happens.  `is_durable` also survives a power loss.
    The temporary file is `scratch`, whose former content is lost, or has a name of its own.
    Raises OSError; the temporary file is removed then.
    """
    if scratch is None:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        scratch = Path(name)
    else:
        with suppress(FileNotFoundError):
            scratch.unlink()
        descriptor = os.open(
            scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode
        )
    try:
        try:
            os.fchmod(descriptor, mode)
            _write_all(descriptor, parts)
            if is_durable:
                flush_to_disk(descriptor)
        finally:
            os.close(descriptor)
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
    if is_durable:
        _flush_folder(path.parent)


def _write_all(descriptor: int, parts: tuple[bytes | memoryview, ...]) -> None:
    for part in parts:
        left = memoryview(part).cast("B")
        while left:
            left = left[os.write(descriptor, left) :]


def flush_to_disk(descriptor: int) -> None:
    """Write a file's data to the disk itself; macOS's fsync stops at the disk's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def flush_path(path: Path) -> None:
    """Write a file, or a folder's entries, to the disk itself.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # Some file systems do not support this, and the rename itself has succeeded.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Give the file at least `size` bytes that are reserved on the disk, keeping its content.

    A write through a mapping of a sparse file ends the process when the disk is full.
    Raises OSError, with ENOSPC if there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise
        else:
            return
    length = os.fstat(descriptor).st_size
    while length < size:
        length += os.pwrite(descriptor, _ZEROS[: size - length], length)


def make_private(path: Path) -> None:
    """Make a database that only its owner can read, or take that right from others; blocks.

    SQLite gives its journals the mode of the database.  Raises OSError.
    """
    # A file that exists is not opened: to close it would drop the locks of this process' other
    # connections (fcntl).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
