"""Prefix blocks on disk, in one folder shared by all processes of a server."""

import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import psutil
from numpy.typing import NDArray

from backends.prefixes.block_file import (
    SUFFIX,
    VERSION_BYTES,
    BlockHead,
    DamagedBlock,
    file_bytes,
    read_head,
    read_state,
    write_block,
    writer_of,
)
from core.files import is_shortage, lock_file, open_regular, why, write_atomically
from core.types import MissReason
from core.units import GIB

logger = logging.getLogger(__name__)

FLOOR_BYTES = 2 * GIB
# Daily write limit in multiples of the size limit; protects the disk from wear.
DAILY_FILLS = 4
# How long nothing is written after the disk refused a write.
RETRY_S = 30.0
_DAY_S = 86_400
_STATE = "state.json"
_LOCK = "lock"
# A process that hangs while it holds the lock must not hang the others.
_LOCK_WAIT_S = 5.0
# A later modification time is wrong: the clock was set back, or the file is foreign.
_CLOCK_TOLERANCE_NS = 60 * 10**9


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """Limits in bytes: of all files, of free disk space, and of writes per day."""

    size_bytes: int
    floor_bytes: int = FLOOR_BYTES
    daily_bytes: int | None = None

    @property
    def max_daily_bytes(self) -> int:
        """Maximum bytes written per day."""
        return self.size_bytes * DAILY_FILLS if self.daily_bytes is None else self.daily_bytes


@dataclass(slots=True)
class WriteResult:
    """Result of a write: files by block key, and the files evicted for them."""

    paths: dict[bytes, Path] = field(default_factory=dict)
    dropped: set[Path] = field(default_factory=set)


@dataclass(slots=True)
class _State:
    """State shared by the processes: the day, its written bytes, and each process's RAM."""

    day: int = 0
    written_bytes: int = 0
    ram_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Files:
    """What the folder holds: (last use in ns, size, path) of its blocks, and bytes in all."""

    blocks: list[tuple[int, int, Path]] = field(default_factory=list)
    total: int = 0


class PrefixFolder:
    """Block files below `path`, a folder for each model and layout, readable by their owner only.

    The name of a model's folder is `<model>-<layout>`.  Evicts the least recently used blocks; a
    file's modification time is its last use.  When the disk refuses a write, nothing is written
    for `RETRY_S`; what is stored can still be read.
    Thread-safe; all methods block on the disk, so engine threads must not call them.
    """

    def __init__(
        self,
        path: Path,
        limits: DiskLimits,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._path = path
        self._limits = limits
        self._now = now
        self._clock = clock
        self._free_bytes = free_bytes or (lambda place: shutil.disk_usage(place).free)
        self._off_until: float | None = None
        self._granted_ram = 0

    @property
    def is_writable(self) -> bool:
        """Whether writes are tried: the disk has not refused one in the last `RETRY_S`."""
        return self._off_until is None or self._clock() >= self._off_until

    def scan(self, model: str, fingerprint: bytes) -> tuple[dict[Path, BlockHead], set[bytes]]:
        """Return the model's blocks, and the keys of its blocks that do not fit `fingerprint`.

        Deletes the blocks of other versions of the model's files, damaged files, and temporary
        files of killed processes, so call it on the writer thread.  Raises OSError.
        """
        found: dict[Path, BlockHead] = {}
        others: set[bytes] = set()
        family = model.partition("-")[0]
        for folder in sorted({self._path / model, *self._path.glob(f"{family}*")}):
            if folder.name.partition("-")[0] != family or not folder.is_dir():
                continue
            for path in sorted(folder.iterdir()):
                head = self._usable_head(path)
                if head is None:
                    continue
                if head.fingerprint == fingerprint and folder.name == model:
                    found[path] = head
                    continue
                others.add(head.key)
                is_current = head.fingerprint[:VERSION_BYTES] == fingerprint[:VERSION_BYTES]
                if folder.name == model or not is_current:
                    drop_file(path)
        return found, others

    def _usable_head(self, path: Path) -> BlockHead | None:
        """Return the head of a block file; deletes what is damaged or left over."""
        if path.suffix != SUFFIX:
            _delete_stale(path)
            return None
        try:
            head = read_head(path, self._limits.size_bytes)
            if head.key.hex() == path.stem:
                return head
            logger.warning("deleting a prefix block that is not what its name says: %s", path.name)
        except FileNotFoundError:
            return None
        except (DamagedBlock, OSError) as problem:
            if isinstance(problem, OSError) and is_shortage(problem):
                return None
            logger.warning("deleting a damaged prefix block: %s", problem)
        drop_file(path)
        return None

    def write(
        self, model: str, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]
    ) -> WriteResult:
        """Write blocks, evicting old ones if needed; blocks that exceed a limit are skipped.

        Never raises OSError: when the disk refuses a write, the other blocks are skipped.
        """
        result = WriteResult()
        if not self.is_writable:
            return result
        try:
            with self._locked() as state:
                self._write(model, blocks, state, result)
        except OSError as problem:
            self._turn_off(problem)
        else:
            self._turn_on()
        return result

    def _write(
        self,
        model: str,
        blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]],
        state: _State,
        result: WriteResult,
    ) -> None:
        files = self._files()
        files.blocks.sort(reverse=True)
        for head, data in blocks:
            size = file_bytes(head)
            path = self._path / model / f"{head.key.hex()}{SUFFIX}"
            if size > self._limits.size_bytes or not self._may_write(state, size):
                continue
            if self._is_stored(files, path, head):
                result.paths[head.key] = path
                continue
            while files.blocks and not self._fits(files, size):
                _, freed, oldest = files.blocks.pop()
                if drop_file(oldest):
                    result.dropped.add(oldest)
                    files.total -= freed
            if not self._fits(files, size):
                continue
            if not path.parent.is_dir():
                drop_file(path.parent)
            _make_private(path.parent)
            write_block(path, head, data)
            state.written_bytes += size
            files.total += size
            result.paths[head.key] = path

    def _is_stored(self, files: _Files, path: Path, head: BlockHead) -> bool:
        """Whether another process has written this block; deletes another file of its name."""
        entry = next((entry for entry in files.blocks if entry[2] == path), None)
        if entry is None:
            return False
        found = self._usable_head(path)
        if found is not None and found.is_same_block(head):
            return True
        if drop_file(path):
            files.blocks.remove(entry)
            files.total -= entry[1]
        return False

    def _may_write(self, state: _State, size: int) -> bool:
        day = int(self._now() // _DAY_S)
        if state.day != day:
            state.day, state.written_bytes = day, 0
        return state.written_bytes + size <= self._limits.max_daily_bytes

    def _fits(self, files: _Files, size: int) -> bool:
        return (
            files.total + size <= self._limits.size_bytes
            and self._free_bytes(self._path) - size >= self._limits.floor_bytes
        )

    def _turn_off(self, problem: OSError) -> None:
        if self._off_until is None:
            logger.warning(
                "computed prefixes are not written to %s: %s. Trying again every %.0f s.",
                self._path,
                why(problem),
                RETRY_S,
            )
        self._off_until = self._clock() + RETRY_S

    def _turn_on(self) -> None:
        if self._off_until is not None:
            logger.warning("computed prefixes are written to %s again", self._path)
        self._off_until = None

    def read(self, path: Path, head: BlockHead) -> NDArray[np.uint8] | MissReason:
        """Return a block's state, or why it cannot be used; a damaged file is deleted."""
        try:
            return read_state(path, head)
        except FileNotFoundError:
            return "evicted"
        except MemoryError:
            return "no_room"
        except (DamagedBlock, OSError) as problem:
            if isinstance(problem, OSError) and is_shortage(problem):
                return "no_room"
            logger.warning("deleting a damaged prefix block: %s", problem)
            drop_file(path)
            return "damaged"

    def touch(self, paths: Sequence[Path]) -> None:
        """Mark a chain of blocks as used; its first block will be evicted last."""
        moment = int(self._now() * 1e9)
        for index, path in enumerate(paths):
            # Another process may have deleted it.
            with suppress(OSError):
                os.utime(path, ns=(moment - index, moment - index), follow_symlinks=False)

    def claim_ram(self, wanted_bytes: int, limit_bytes: int) -> int:
        """Reserve RAM from the limit that all processes share; return the granted bytes.

        Replaces this process's earlier reservation, which stays if the disk refuses a new one.
        """
        mine = str(os.getpid())
        try:
            with self._locked(must_save=True) as state:
                others = {
                    pid: size
                    for pid, size in state.ram_bytes.items()
                    if pid != mine and psutil.pid_exists(int(pid))
                }
                granted = max(min(wanted_bytes, limit_bytes - sum(others.values())), 0)
                state.ram_bytes = {**others, mine: granted}
        except OSError as problem:
            self._turn_off(problem)
            return min(wanted_bytes, self._granted_ram)
        self._granted_ram = granted
        return granted

    def _files(self) -> _Files:
        """List the folder; deletes temporary files of killed processes, and what is no file."""
        found = _Files()
        latest = int(self._now() * 1e9) + _CLOCK_TOLERANCE_NS
        for path in self._path.glob("*/*"):
            if path.suffix != SUFFIX and (writer_of(path) is None or _delete_stale(path)):
                continue
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if path.suffix == SUFFIX and not stat.S_ISREG(status.st_mode):
                drop_file(path)
                continue
            found.total += status.st_size
            if path.suffix == SUFFIX:
                used = status.st_mtime_ns if status.st_mtime_ns <= latest else 0
                found.blocks.append((used, status.st_size, path))
        return found

    @contextmanager
    def _locked(self, *, must_save: bool = False) -> Iterator[_State]:
        """Lock the folder, yield the shared state, and save it at the end.  Raises OSError."""
        _make_private(self._path)
        self._drop_unless_file(_LOCK)
        with _open_private(self._path / _LOCK) as lock:
            lock_file(lock, _LOCK_WAIT_S)
            state = self._read_state()
            try:
                yield state
            finally:
                try:
                    self._save_state(state)
                except OSError:
                    if must_save:
                        raise

    def _drop_unless_file(self, name: str) -> None:
        """Delete a folder, link or pipe that has the name of one of the folder's own files."""
        with suppress(FileNotFoundError):
            if not stat.S_ISREG((self._path / name).lstat().st_mode):
                drop_file(self._path / name)

    def _read_state(self) -> _State:
        try:
            with open_regular(self._path / _STATE) as file:
                known = json.loads(file.read())
            ram = {str(int(pid)): int(size) for pid, size in known["ram_bytes"].items()}
            return _State(int(known["day"]), int(known["written_bytes"]), ram)
        except FileNotFoundError:
            return _State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            logger.warning("the prefix folder's state is unreadable and is reset: %r", problem)
            return _State()

    def _save_state(self, state: _State) -> None:
        text = json.dumps({
            "day": state.day, "written_bytes": state.written_bytes, "ram_bytes": state.ram_bytes,
        })  # fmt: skip
        scratch = self._path / f"{_STATE}.tmp"
        for name in (_STATE, scratch.name):
            self._drop_unless_file(name)
        write_atomically(self._path / _STATE, text.encode(), scratch=scratch, is_durable=False)


def _make_private(folder: Path) -> None:
    """Create the folder, or restrict an existing one, with mode 0700."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _open_private(path: Path) -> IO[bytes]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "rb+", buffering=0)


def _delete_stale(path: Path) -> bool:
    """Delete a temporary file whose writer is dead, or had the process id that is now ours."""
    writer = writer_of(path)
    is_stale = writer == os.getpid() or (writer is not None and not psutil.pid_exists(writer))
    return is_stale and drop_file(path)


def drop_file(path: Path) -> bool:
    """Delete a file, or a folder that has its name; return whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)
