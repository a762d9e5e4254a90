"""Record of what a replica process computes, in a mapped file that outlives the process.

A process that is killed or crashes in native code cannot say what it was doing.  So each replica
keeps a small file up to date by plain stores to mapped memory, which the kernel preserves; the
router and the scheduler read it after the death.  The file is locked while its process lives.
It lies in memory where the system has a folder for that: stores to a file can wait for its disk.
"""

import asyncio
import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path
from stat import S_ISDIR

from core.files import open_regular

logger = logging.getLogger(__name__)

_MAGIC = b"IMPACT01"
_HEADER_BYTES = 64
# A model's place: in a step (1 byte), length of its id (2 bytes, 0: free), its id.
_MODEL = struct.Struct("<BxH")
_MODEL_BYTES = 512
_MODELS = 128
# An entry: what (1 byte, 0: free), whether its request is a suspect, model's place, request.
_ENTRY = struct.Struct("<BBHxxxxQ")
_ENTRIES = 8192
_ENTRIES_AT = _HEADER_BYTES + _MODELS * _MODEL_BYTES
FILE_BYTES = _ENTRIES_AT + _ENTRIES * _ENTRY.size

_PREFIX = "activity-"
_SHARED_MEMORY = Path("/dev/shm")
# A record is kept this long after its process, for all that ask why their request was lost.
_KEPT_S = 600.0
_DYING_S, _DYING_POLL_S = 1.0, 0.02
# Nobody may open it for writing: a mapped file that is truncated ends its process.
_ALIVE, _DEAD = 0o500, 0o400


class Doing(IntEnum):
    """What an entry records."""

    SERVING = 1
    LOADING = 2
    WORKING = 3
    PREFILL = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Something a process did when it died; `request` is 0 for a load.

    `in_step`: a forward pass of the model was running.  `is_suspect`: an earlier process died
    while it computed the same request.
    """

    model_id: str
    doing: Doing
    request: int = 0
    is_suspect: bool = False
    in_step: bool = False

    @property
    def is_computed(self) -> bool:
        """Whether native code ran for this work; a prompt is computed only within a step."""
        return self.doing in (Doing.LOADING, Doing.WORKING) or (
            self.doing is Doing.PREFILL and self.in_step
        )


@dataclass(frozen=True, slots=True)
class DeathCause:
    """Which models and requests were computed when a process died; both empty if it was idle.

    `is_confirmed`: an earlier process died while it computed the same request.
    """

    models: frozenset[str] = frozenset()
    requests: frozenset[int] = frozenset()
    is_confirmed: bool = False

    def names(self, request_id: str) -> bool:
        """Whether the process may have died of this request."""
        return request_key(request_id) in self.requests


def cause_of(works: Sequence[Work]) -> DeathCause:
    """Return what a process probably died of.

    Suspects come first, as they run one at a time: one that was computed is the cause.  Else each
    request is that was prepared, embedded or in the prefill of the running step.  Models: those of
    the suspects, else the one being loaded, else those of the requests, else the one whose step
    decoded, else those with a request in flight.
    """
    computed = [work for work in works if work.is_computed]
    suspects = [work for work in computed if work.is_suspect]
    requests = frozenset(work.request for work in suspects or computed if work.request)
    ranks = (
        suspects,
        [work for work in computed if work.doing is Doing.LOADING],
        computed,
        [work for work in works if work.in_step],
        works,
    )
    chosen = next((rank for rank in ranks if rank), ())
    return DeathCause(frozenset(work.model_id for work in chosen), requests, bool(suspects))


def request_key(request_id: str) -> int:
    """Return the number that stands for a request in the file."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")


def activity_path(home: Path, replica_id: str) -> Path:
    """Return the record of one replica process; `home` is the server's data folder."""
    folder = _memory_folder()
    if folder is None:
        return home / "run" / f"{_PREFIX}{replica_id}"
    return folder / f"{_PREFIX}{request_key(str(home)):016x}-{replica_id}"


def _memory_folder() -> Path | None:
    """Return this user's own folder in memory; None if there is none (macOS)."""
    folder = _SHARED_MEMORY / f"impetus-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    # Everybody may create names there.
    is_own = S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return folder if is_own and not status.st_mode & 0o077 else None


class ActivityFile:
    """This process's record.  Thread-safe: each call stores to places of its own.

    If the file cannot be made, the record is kept in memory only, where nobody finds it.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; blocks for a small write.  Removes old records beside it."""
        self._path = path
        self._file = -1
        self._map = mmap.mmap(-1, FILE_BYTES)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            self._file = _create(path)
            self._map = mmap.mmap(self._file, FILE_BYTES)
        except OSError as problem:
            logger.warning("no record of this process's work: %s: %s", path, problem)
        # Popping from and appending to a list is atomic; the lowest places are used first.
        self._free_models = list(range(_MODELS - 1, -1, -1))
        self._free_entries = list(range(_ENTRIES - 1, -1, -1))

    def open_model(self, model_id: str) -> "ModelActivity":
        """Return the record of one load of a model; close it with the model."""
        place = self._free_models.pop() if self._free_models else -1
        if place >= 0:
            name = model_id.encode("utf-8", "replace")[: _MODEL_BYTES - _MODEL.size]
            at = _HEADER_BYTES + place * _MODEL_BYTES
            self._map[at + _MODEL.size : at + _MODEL.size + len(name)] = name
            _MODEL.pack_into(self._map, at, 0, len(name))
        return ModelActivity(self, place)

    def close_model(self, place: int) -> None:
        """Free a model's place; for `ModelActivity`."""
        if place >= 0:
            _MODEL.pack_into(self._map, _HEADER_BYTES + place * _MODEL_BYTES, 0, 0)
            self._free_models.append(place)

    def step_flag(self, place: int) -> "_StepFlag":
        """Return the context manager that marks a model's steps; for `ModelActivity`."""
        at = _HEADER_BYTES + place * _MODEL_BYTES if place >= 0 else _HEADER_BYTES - 1
        return _StepFlag(self._map, at)

    def begin(self, place: int, doing: Doing, request: int, *, is_suspect: bool = False) -> int:
        """Add an entry; return its number for `end`, -1 if there is no room."""
        if place < 0:
            return -1
        try:
            entry = self._free_entries.pop()
        except IndexError:
            return -1
        at = _ENTRIES_AT + entry * _ENTRY.size
        _ENTRY.pack_into(self._map, at, doing, is_suspect, place, request)
        return entry

    def end(self, entry: int) -> None:
        """Remove an entry."""
        if entry >= 0:
            self._map[_ENTRIES_AT + entry * _ENTRY.size] = 0
            self._free_entries.append(entry)

    def close(self) -> None:
        """Remove the file: this process ends in order; idempotent."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


class _StepFlag:
    """Marks a model's step while entered; reused for every step, by one thread at a time."""

    __slots__ = ("_at", "_map")

    def __init__(self, mapped: mmap.mmap, at: int) -> None:
        self._map = mapped
        self._at = at

    def __enter__(self) -> None:
        self._map[self._at] = 1

    def __exit__(self, *_: object) -> None:
        self._map[self._at] = 0


class ModelActivity:
    """The record of one load of a model; implements `backends.engine.activity.Activity`."""

    def __init__(self, file: ActivityFile, place: int) -> None:
        self._file = file
        self._place = place
        self._suspects: set[int] = set()
        self._prefills: dict[int, int] = {}
        self.step: AbstractContextManager[object] = file.step_flag(place)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Enter while the model is loaded."""
        entry = self._file.begin(self._place, Doing.LOADING, 0)
        try:
            yield
        finally:
            self._file.end(entry)

    @contextmanager
    def serving(self, request_id: str, *, is_suspect: bool) -> Iterator[None]:
        """Enter while a request is in flight; ends its other entries."""
        key = request_key(request_id)
        if is_suspect:
            self._suspects.add(key)
        entry = self._file.begin(self._place, Doing.SERVING, key, is_suspect=is_suspect)
        try:
            yield
        finally:
            self._file.end(entry)
            self._end_prefill(key)
            self._suspects.discard(key)

    @contextmanager
    def working(self, *request_ids: str) -> Iterator[None]:
        """Enter while these requests are prepared, tokenized or embedded."""
        entries = [self._begin(Doing.WORKING, request_key(name)) for name in request_ids]
        try:
            yield
        finally:
            for entry in entries:
                self._file.end(entry)

    def begin_prefill(self, request_id: str) -> None:
        """Note a request whose prompt the next steps compute."""
        key = request_key(request_id)
        self._end_prefill(key)
        self._prefills[key] = self._begin(Doing.PREFILL, key)

    def end_prefill(self, request_id: str) -> None:
        """Note that a request has its first token; idempotent."""
        self._end_prefill(request_key(request_id))

    def _begin(self, doing: Doing, key: int) -> int:
        return self._file.begin(self._place, doing, key, is_suspect=key in self._suspects)

    def _end_prefill(self, key: int) -> None:
        entry = self._prefills.pop(key, None)
        if entry is not None:
            self._file.end(entry)

    def close(self) -> None:
        """Free the model's place, when none of its requests is left."""
        self._file.close_model(self._place)
        self._place = -1


class DeathRecords:
    """Reads the records of dead processes; remembers the last few.  Belongs to one event loop."""

    _MOST = 16

    def __init__(self, home: Path) -> None:
        self._home = home
        self._known: dict[str, DeathCause] = {}
        self._reading: dict[str, asyncio.Task[DeathCause | None]] = {}

    async def cause(self, replica_id: str) -> DeathCause | None:
        """Return what a process died of; None if it lives, or its record cannot be read.

        Waits up to a second for a process that is being killed.  A process on another machine has
        no record here.
        """
        known = self._known.get(replica_id)
        if known is not None:
            return known
        # All requests of a dead process ask at once.
        reading = self._reading.get(replica_id)
        if reading is None:
            reading = self._reading[replica_id] = asyncio.ensure_future(self._read(replica_id))
            reading.add_done_callback(lambda _: self._reading.pop(replica_id, None))
        return await asyncio.shield(reading)

    async def _read(self, replica_id: str) -> DeathCause | None:
        path = activity_path(self._home, replica_id)
        deadline = time.monotonic() + _DYING_S
        while (works := await asyncio.to_thread(read_activity, path)) is None:
            if time.monotonic() > deadline or not path.exists():
                return None
            await asyncio.sleep(_DYING_POLL_S)
        cause = self._known[replica_id] = cause_of(works)
        for old in list(self._known)[: -self._MOST]:
            self._known.pop(old, None)
        return cause


def read_activity(path: Path) -> tuple[Work, ...] | None:
    """Return what a dead process was doing; None if it lives, or has no readable record."""
    try:
        with open_regular(path) as file:
            if not _is_released(file.fileno()):
                return None
            data = file.read(FILE_BYTES + 1)
    except OSError:
        return None
    if len(data) != FILE_BYTES or not data.startswith(_MAGIC):
        return None
    models: list[tuple[str, bool]] = []
    for at in range(_HEADER_BYTES, _ENTRIES_AT, _MODEL_BYTES):
        in_step, length = _MODEL.unpack_from(data, at)
        name = data[at + _MODEL.size : at + _MODEL.size + min(length, _MODEL_BYTES - _MODEL.size)]
        models.append((name.decode("utf-8", "replace"), bool(in_step and length)))
    return tuple(
        Work(models[place][0], Doing(doing), request, bool(suspect), models[place][1])
        for doing, suspect, place, request in _ENTRY.iter_unpack(data[_ENTRIES_AT:])
        if 0 < doing <= max(Doing) and place < _MODELS and models[place][0]
    )


def sweep(folder: Path) -> None:
    """Remove records ten minutes after it was first seen that their process is gone."""
    oldest = time.time() - _KEPT_S
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                if not _is_released(file.fileno()):
                    continue
                # Stores to mapped memory do not set the file's time.
                if status.st_mode & _ALIVE & ~_DEAD:
                    path.chmod(_DEAD)
                    os.utime(path)
                elif status.st_mtime < oldest:
                    path.unlink()
        except OSError:
            logger.debug("the record %s was removed meanwhile", path)


def _create(path: Path) -> int:
    """Return the descriptor of a new file whose blocks exist: a hole would fault on a full disk."""
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _ALIVE)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = memoryview(_MAGIC.ljust(FILE_BYTES, b"\0"))
        while content:
            content = content[os.write(file, content) :]
    except OSError:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file


def _is_released(file: int) -> bool:
    """Whether the process that made the file is gone; the lock ends with it.  Source: flock(2)."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True
