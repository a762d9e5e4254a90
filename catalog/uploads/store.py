"""Keeps unfinished uploads on disk: each in a folder of its own, outside of what is scanned.

Below `incoming` of the data folder each upload has a folder named by its id, with `upload.json`
and, in `model/NAME`, its files.  A file is written from its start, and its size is how far it is:
nothing else is lost by the end of a process.  All methods block.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from catalog.uploads.names import same_name
from catalog.uploads.upload import Announced, Upload, UploadFile, announced
from core.errors import (
    ChunkRejected,
    ImpetusError,
    InsufficientDisk,
    NotFound,
    RequestError,
    Unavailable,
    UploadConflict,
)
from core.files import lock_file, why, write_atomically
from core.units import MIB, format_bytes

HEADROOM_BYTES = 512 * MIB
# An upload to which nothing was added for as long is removed.
KEPT_S = 7 * 24 * 3600.0
MAX_UPLOADS = 32
_ID = re.compile(r"[0-9a-f]{32}")
_STATE = "upload.json"
_LOCK = "lock"
_MODEL = "model"
_MAX_STATE_BYTES = 4 * MIB
_LOCK_S = 10.0


@dataclass(frozen=True, slots=True)
class UploadState:
    """An upload, and how many bytes of each of its files have arrived, in their order."""

    upload: Upload
    offsets: tuple[int, ...]

    @property
    def done_bytes(self) -> int:
        """Bytes that have arrived."""
        return sum(self.offsets)


class UploadStore:
    """The unfinished uploads of a data folder; for any thread and process."""

    def __init__(self, home: Path) -> None:
        self._incoming = home / "incoming"
        self._targets = home / "models" / "uploads"

    def folder(self, upload_id: str) -> Path:
        """Return the folder of an upload.  Raises NotFound for what is not an id."""
        if not _ID.fullmatch(upload_id):
            raise _unknown(upload_id)
        return self._incoming / upload_id

    def model_folder(self, upload: Upload) -> Path:
        """Return where the files of an upload are until it is done."""
        return self.folder(upload.id) / _MODEL / upload.name

    def target(self, name: str) -> Path:
        """Return the folder that a model with this name gets."""
        return self._targets / name

    def create(self, files: Sequence[Announced], name: str) -> UploadState:
        """Return a new upload.  Raises RequestError, UploadConflict, InsufficientDisk."""
        upload = announced(secrets.token_hex(16), files, name, time.time())
        open_ones = self.uploads()
        if len(open_ones) >= MAX_UPLOADS:
            raise RequestError(
                f"There are {MAX_UPLOADS} unfinished uploads; finish or delete some first."
            )
        self.check_name(upload.name, open_ones)
        try:
            self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            missing = sum(one.upload.size_bytes - one.done_bytes for one in open_ones)
            require_space(self._incoming, upload.size_bytes, missing, "The upload")
            self._write(upload)
        except OSError as problem:
            shutil.rmtree(self.folder(upload.id), ignore_errors=True)
            raise _disk(problem) from problem
        return self._state(upload)

    def check_name(self, name: str, open_ones: Iterable[UploadState] = ()) -> None:
        """Raise UploadConflict if a model, or another upload, has this name."""
        with suppress(OSError):
            for taken in os.listdir(self._targets):
                if same_name(taken) == same_name(name):
                    raise UploadConflict(
                        f"A model named {taken!r} was uploaded or imported before; delete it, or "
                        "give this one another `name`.",
                        param="name",
                    )
        for one in open_ones:
            if same_name(one.upload.name) == same_name(name):
                raise UploadConflict(
                    f"The upload {one.upload.id} of {one.upload.name!r} is not finished; continue "
                    "or delete it, or give this one another `name`.",
                    param="name",
                )

    def _write(self, upload: Upload) -> None:
        """Make the folder and the empty files of an upload, and last what names it."""
        folder, model = self.folder(upload.id), self.model_folder(upload)
        folder.mkdir(mode=0o700)
        (folder / _LOCK).touch(mode=0o600)
        model.mkdir(parents=True)
        for file in upload.files:
            (model / file.path).parent.mkdir(parents=True, exist_ok=True)
            (model / file.path).touch(mode=0o644, exist_ok=False)
        write_atomically(folder / _STATE, upload.to_json().encode())

    def get(self, upload_id: str) -> UploadState:
        """Return an upload.  Raises NotFound."""
        return self._state(self._read(upload_id))

    def uploads(self) -> list[UploadState]:
        """Return all unfinished uploads, oldest first."""
        found = []
        for folder in _folders(self._incoming):
            with suppress(NotFound, OSError):
                found.append(self.get(folder.name))
        return sorted(found, key=lambda one: (one.upload.created, one.upload.id))

    def _read(self, upload_id: str) -> Upload:
        path = self.folder(upload_id) / _STATE
        try:
            with path.open("rb") as file:
                return Upload.from_json(file.read(_MAX_STATE_BYTES).decode())
        except (OSError, ValueError, TypeError, KeyError):
            raise _unknown(upload_id) from None

    def _state(self, upload: Upload) -> UploadState:
        model = self.model_folder(upload)
        return UploadState(upload, tuple(_size(model / file.path) for file in upload.files))

    def write_chunk(
        self, upload_id: str, number: int, offset: int, data: bytes, sha256: bytes
    ) -> UploadState:
        """Add a chunk to a file; `sha256` is what its sender computed.

        Raises NotFound, ChunkRejected for another hash or too many bytes, UploadConflict for a
        chunk that does not begin where the file ends, and after `finish`.
        """
        if hashlib.sha256(data).digest() != sha256:
            raise ChunkRejected(
                "The chunk's bytes do not have the SHA-256 of its Content-Digest: they were "
                "changed on the way. Send it again.",
                param="content-digest",
            )
        with self._locked(upload_id) as upload:
            if upload.is_finished:
                raise UploadConflict("The upload is finished and takes no more bytes.")
            file = _file(upload, number)
            self._append(self.model_folder(upload) / file.path, file, offset, data)
            return self._state(upload)

    def _append(self, path: Path, file: UploadFile, offset: int, data: bytes) -> None:
        size = _size(path)
        if offset != size:
            raise UploadConflict.at(
                f"The server has {size} bytes of {file.path!r}; send the chunk that begins there, "
                f"not at {offset}.",
                size,
            )
        if offset + len(data) > file.size_bytes:
            raise ChunkRejected(
                f"The chunk ends at {offset + len(data)}, but {file.path!r} was announced with "
                f"{file.size_bytes} bytes; delete the upload and announce it anew.",
                param="upload-offset",
            )
        try:
            _write_at(path, offset, data)
        except OSError as problem:
            raise _disk(problem) from problem

    def finish(self, upload_id: str) -> Upload:
        """Take no more bytes; return the upload, also if it was finished before.

        Raises NotFound, and UploadConflict naming a file that is not complete.
        """
        with self._locked(upload_id) as upload:
            state = self._state(upload)
            for file, offset in zip(upload.files, state.offsets, strict=True):
                if offset != file.size_bytes:
                    raise UploadConflict.at(
                        f"The server has {offset} of {file.size_bytes} bytes of {file.path!r}; "
                        "send the rest first.",
                        offset,
                    )
            if not upload.is_finished:
                upload = replace(upload, is_finished=True)
                write_atomically(self.folder(upload_id) / _STATE, upload.to_json().encode())
            return upload

    def remove(self, upload_id: str) -> None:
        """Delete an upload with what has arrived.  Raises NotFound."""
        with self._locked(upload_id):
            # First what names it: a process that ends here leaves nothing to go on with.
            with suppress(FileNotFoundError):
                (self.folder(upload_id) / _STATE).unlink()
            self.discard(upload_id)

    def discard(self, upload_id: str) -> None:
        """Delete an upload's folder, whatever is in it."""
        shutil.rmtree(self.folder(upload_id), ignore_errors=True)

    def sweep(self, in_use: Iterable[str], now: float) -> list[str]:
        """Delete what nothing was added to for a week; return the ids.

        Those `in_use` belong to jobs that are not over.
        """
        kept = set(in_use)
        removed = []
        for folder in _folders(self._incoming):
            if folder.name not in kept and now - _newest(folder) > KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        return removed

    @contextmanager
    def _locked(self, upload_id: str) -> Iterator[Upload]:
        """Keep other writers of an upload away; wait up to 10 s for one.  Raises NotFound."""
        self._read(upload_id)
        try:
            with (self.folder(upload_id) / _LOCK).open("rb+") as lock:
                lock_file(lock, _LOCK_S)
                yield self._read(upload_id)
        except FileNotFoundError:
            raise _unknown(upload_id) from None
        except BlockingIOError:
            raise Unavailable(
                "Another chunk of this upload is still being written; send it again.",
                retry_after_s=1,
            ) from None


def require_space(folder: Path, size_bytes: int, reserved_bytes: int, what: str) -> None:
    """Raise InsufficientDisk with the numbers if the disk of `folder` has no room for `size_bytes`.

    `reserved_bytes` are still to come of other uploads.
    """
    free = shutil.disk_usage(folder).free
    needed = size_bytes + reserved_bytes + HEADROOM_BYTES
    if free < needed:
        others = f", {format_bytes(reserved_bytes)} for other uploads" if reserved_bytes else ""
        raise InsufficientDisk(
            f"{what} needs {format_bytes(size_bytes)}{others} and leaves "
            f"{format_bytes(HEADROOM_BYTES)} free, but {format_bytes(free)} are free in {folder}. "
            f"Free {format_bytes(needed - free)}, or choose a smaller model."
        )


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Write bytes at the end of a file and to the disk itself; a failure leaves it as it was."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    try:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.pwrite(descriptor, rest, offset + len(data) - len(rest)) :]
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, offset)
            raise
    finally:
        os.close(descriptor)


def _file(upload: Upload, number: int) -> UploadFile:
    for file in upload.files:
        if file.number == number:
            return file
    raise NotFound(f"The upload {upload.id} has no file {number}.", param="file")


def _size(path: Path) -> int:
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return 0


def _folders(incoming: Path) -> list[Path]:
    with suppress(OSError), os.scandir(incoming) as listing:
        return [
            Path(entry.path)
            for entry in listing
            if _ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    return []


def _newest(folder: Path) -> float:
    """Return when something was last written in a folder, in Unix seconds."""
    newest = 0.0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            with suppress(OSError):
                newest = max(newest, os.lstat(path).st_mtime)
    return newest


def _unknown(upload_id: str) -> NotFound:
    return NotFound(
        f"There is no unfinished upload {upload_id[:40]!r}; after `finish` its job tells how it "
        "ended.",
        param="id",
    )


def _disk(problem: OSError) -> ImpetusError:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientDisk(
            f"The upload cannot be written: {why(problem)}. What has arrived is kept; make room "
            "and send the chunk again."
        )
    return Unavailable(
        f"The upload cannot be written: {why(problem)}. What has arrived is kept.",
        retry_after_s=10,
    )
