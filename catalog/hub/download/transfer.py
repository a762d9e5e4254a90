"""Downloads one file: resumes what is there, checks its hash, makes it visible when it is whole."""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import httpx2

from catalog.hub.client import HubClient
from catalog.hub.download.job import partial_file
from catalog.hub.download.url import UrlSource
from catalog.hub.entries import RepositoryFile
from core.errors import (
    ChecksumFailed,
    HubAnswerInvalid,
    HubOffline,
    HubUnavailable,
    ImpetusError,
    InsufficientDisk,
    RequestError,
    Unavailable,
)
from core.files import flush_to_disk, open_regular, why, write_atomically
from core.units import MIB, format_bytes

# Free space that a download leaves for others.
HEADROOM_BYTES = 512 * MIB
_READ_BYTES = 1 << 20
_TRIES = 8
_LONGEST_WAIT_S = 60.0
_PACE_STEP_S = 1.0
# Of names: trying again changes nothing.
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class Pace:
    """Keeps all transfers together below a number of bytes in a second, 0: none.

    `sleep` waits; for several threads, also `change`.
    """

    bytes_per_s: int = 0
    sleep: Callable[[float], None] = time.sleep
    _due: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def passed(self, count: int, now: float) -> None:
        """Wait until `count` more bytes are due."""
        limit = self.bytes_per_s
        if limit <= 0:
            return
        with self._lock:
            self._due = max(self._due, now) + count / limit
            wait_s = self._due - now
        while wait_s > 0 and self.bytes_per_s == limit:
            self.sleep(min(wait_s, _PACE_STEP_S))
            wait_s -= _PACE_STEP_S

    def change(self, bytes_per_s: int) -> None:
        """Keep to another number from now on; those that wait go on within a second."""
        with self._lock:
            self.bytes_per_s, self._due = bytes_per_s, 0.0


@dataclass(slots=True)
class _Partial:
    """An unfinished file: how much of it is there, the hash of that, and the server's ETag."""

    path: Path
    stream: FileIO
    digest: Any
    done: int = 0
    etag: str = ""

    @property
    def note(self) -> Path:
        """The file that keeps the ETag."""
        return self.path.with_name(f"{self.path.name}.etag")

    def restart(self, digest: Any) -> None:
        """Forget what is there."""
        self.stream.seek(0)
        self.stream.truncate()
        self.digest, self.done, self.etag = digest, 0, ""

    def append(self, piece: bytes) -> None:
        """Write and hash the next bytes."""
        left = memoryview(piece)
        while left:
            left = left[self.stream.write(left) :]
        self.digest.update(piece)
        self.done += len(piece)

    def keep_etag(self, etag: str) -> None:
        """Remember the validator of what arrives; a weak one says nothing of bytes."""
        self.etag = "" if etag.startswith("W/") else etag
        write_atomically(self.note, self.etag.encode(), is_durable=False)


@dataclass(slots=True)
class Transfer:
    """Downloads files of one commit into the folder `work`; blocks, for several threads.

    `on_bytes` is told by how many bytes the files in `work` grew, negative when some were thrown
    away; `on_fetched` before it of those that came by the network; `on_wait` the seconds until the
    next try, and why.  `shared` are local files by SHA-256, which are copied.  `hashes` has those
    of the files that were completed, by path.
    """

    client: HubClient | UrlSource
    repository: str
    commit: str
    work: Path
    on_bytes: Callable[[int], None]
    on_wait: Callable[[float, str], None]
    pace: Pace = field(default_factory=Pace)
    shared: Mapping[str, Path] = field(default_factory=dict)
    on_fetched: Callable[[int], None] = lambda _: None
    hashes: dict[str, str] = field(default_factory=dict)

    def fetch(self, file: RepositoryFile) -> None:
        """Make `file` appear in the folder, whole and checked.

        Raises ChecksumFailed after a second wrong content, InsufficientDisk, the errors `Hub…`
        once eight tries in a row brought nothing, and Unavailable for other errors of the disk.
        """
        final = self.work / file.path
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.is_file() and final.stat().st_size == file.size_bytes:
                self.on_bytes(file.size_bytes)
                self.hashes[file.path] = _stated_hash(file)
                return
            try:
                self._complete(file, final, self.shared.get(file.sha256))
            except ChecksumFailed:
                self._complete(file, final, None)
        except OSError as problem:
            raise disk_problem(problem, self.work, file.size_bytes) from problem

    def _complete(self, file: RepositoryFile, final: Path, local: Path | None) -> None:
        partial_path = partial_file(self.work, file.path)
        partial_path.parent.mkdir(exist_ok=True)
        # Not truncated: what is there is used.
        descriptor = os.open(
            partial_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        # Unbuffered: what has arrived is in the file, whatever ends this process.
        with os.fdopen(descriptor, "r+b", buffering=0) as stream:
            partial = self._open_partial(file, partial_path, stream)
            try:
                if local is not None:
                    self._copy(file, partial, local)
                self._fill(file, partial)
                self._check(file, partial)
            except ChecksumFailed:
                self.on_bytes(-partial.done)
                for path in (partial_path, partial.note):
                    path.unlink(missing_ok=True)
                raise
            flush_to_disk(stream.fileno())
        self.hashes[file.path] = partial.digest.hexdigest()
        partial_path.replace(final)
        partial.note.unlink(missing_ok=True)

    def _copy(self, file: RepositoryFile, partial: _Partial, local: Path) -> None:
        """Append the rest of the file from a local one; its hash is checked as any other's."""
        try:
            with open_regular(local) as source:
                source.seek(partial.done)
                while (left := file.size_bytes - partial.done) and (
                    piece := source.read(min(left, _READ_BYTES))
                ):
                    partial.append(piece)
                    self.on_bytes(len(piece))
        except FileNotFoundError:
            # It was deleted meanwhile: the hub has it as well.
            return

    def _open_partial(self, file: RepositoryFile, path: Path, stream: FileIO) -> _Partial:
        """Return the unfinished file with the hash of what is there of it."""
        partial = _Partial(path, stream, _digest(file))
        while piece := stream.read(_READ_BYTES):
            partial.digest.update(piece)
            partial.done += len(piece)
        if partial.done > file.size_bytes:
            partial.restart(_digest(file))
        try:
            partial.etag = partial.note.read_text("ascii")[:200]
        except (OSError, UnicodeDecodeError):
            partial.etag = ""
        self.on_bytes(partial.done)
        return partial

    def _fill(self, file: RepositoryFile, partial: _Partial) -> None:
        """Read until the file is whole; tries again while that brings something."""
        tries = 0
        while partial.done < file.size_bytes:
            before = partial.done
            try:
                self._read(file, partial)
                return
            except ChecksumFailed:
                raise
            except (HubOffline, HubAnswerInvalid):
                raise
            except HubUnavailable as problem:
                tries = 1 if partial.done > before else tries + 1
                if tries >= _TRIES:
                    raise
                wait_s = float(problem.retry_after_s or min(2.0 ** (tries - 1), _LONGEST_WAIT_S))
                self.on_wait(wait_s, problem.message)
                self.pace.sleep(wait_s)

    def _read(self, file: RepositoryFile, partial: _Partial) -> None:
        """Append what one answer has of the file."""
        if partial.done and not (partial.etag or _stated_hash(file)):
            # Nothing would tell whether the rest is of the same file.
            self.on_bytes(-partial.done)
            partial.restart(_digest(file))
        address = self.client.file_address(self.repository, self.commit, file.path)
        headers = {"Range": f"bytes={partial.done}-"} if partial.done else {}
        if partial.done and partial.etag:
            headers["If-Range"] = partial.etag
        what = f"{file.path} of {self.repository}"
        with self.client.opened(address, what, headers) as response:
            self._align(file, partial, response)
            for piece in response.iter_raw():
                if partial.done + len(piece) > file.size_bytes:
                    raise _wrong(file, f"more than its {file.size_bytes:,} bytes arrived")
                partial.append(piece)
                self.on_fetched(len(piece))
                self.on_bytes(len(piece))
                self.pace.passed(len(piece), time.monotonic())
        if partial.done < file.size_bytes:
            raise _wrong(file, f"{partial.done:,} of its {file.size_bytes:,} bytes arrived")

    def _align(self, file: RepositoryFile, partial: _Partial, response: httpx2.Response) -> None:
        """Place the next bytes: after those that are there if the answer goes on, else anew."""
        stated = response.headers.get("content-range", "")
        expected = f"bytes {partial.done}-{file.size_bytes - 1}/{file.size_bytes}"
        goes_on = response.status_code == 206 and stated == expected
        if partial.done and not goes_on:
            self.on_bytes(-partial.done)
            partial.restart(_digest(file))
            if response.status_code == 206:
                # Of another file, or from another place: asked for as a whole.
                raise HubUnavailable(
                    f"{self.client.host} sent another part of {file.path} than was asked for."
                )
        if not partial.done:
            partial.keep_etag(response.headers.get("etag", ""))

    def _check(self, file: RepositoryFile, partial: _Partial) -> None:
        """Raise ChecksumFailed if the hash is not the one that the hub stated."""
        found, stated = partial.digest.hexdigest(), _stated_hash(file)
        if stated and found != stated:
            kind = "SHA-256" if file.sha256 else "git hash"
            raise _wrong(file, f"its {kind} is {found[:16]}…, the hub stated {stated[:16]}…")


def _digest(file: RepositoryFile) -> Any:
    """Return the kind of hash that is stated for a file: SHA-256, or git's of a small one."""
    if file.sha256 or not file.git_oid:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)


def _stated_hash(file: RepositoryFile) -> str:
    """Return the hash that the hub stated, empty for a file of a plain address."""
    return file.sha256 or file.git_oid


def has_stated_hash(file: RepositoryFile, path: Path) -> bool:
    """Whether a file has the size and the hash that the hub stated; blocks while it is read.

    False for a file of which no hash is stated.  Raises OSError.
    """
    digest = _digest(file)
    if not _stated_hash(file) or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    return bool(digest.hexdigest() == _stated_hash(file))


def _wrong(file: RepositoryFile, reason: str) -> ChecksumFailed:
    return ChecksumFailed(
        f"The download of {file.path} was damaged ({reason}) and was removed. If it happens again, "
        "the copy on the hub is damaged, or something on the way changes it, such as a proxy."
    )


def disk_problem(problem: OSError, folder: Path, needed_bytes: int) -> ImpetusError:
    """Return the error for a file that could not be written; a full disk has the numbers."""
    if problem.errno in _IMPOSSIBLE:
        return RequestError(
            f"A file of it cannot be stored here ({why(problem)}): this disk does not have such "
            "names, or there is another file of that name. Choose another model.",
            param="model",
        )
    if problem.errno not in _FULL:
        return Unavailable(
            f"The download could not be written to {folder.parent} ({why(problem)}). Check the "
            "permissions of the folder and the disk, then resume it."
        )
    try:
        free = format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        free = "an unknown number of bytes"
    return InsufficientDisk(
        f"The disk of {folder.parent} is full ({why(problem)}): a file of "
        f"{format_bytes(needed_bytes)} was being written, {free} are free. Free some space, then "
        "resume the download: what has arrived is kept."
    )
