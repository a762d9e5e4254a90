"""Prefix blocks on disk, in one folder shared by all processes of a server."""

import fcntl
import json
import logging
import os
import shutil
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
    BlockHead,
    DamagedBlock,
    file_bytes,
    read_head,
    read_state,
    write_block,
    writer_of,
)
from core.units import GIB

logger = logging.getLogger(__name__)

FLOOR_BYTES = 2 * GIB
# Daily write limit in multiples of the size limit; protects the disk from wear.
DAILY_FILLS = 4
_DAY_S = 86_400
_STATE = "state.json"
_LOCK = "lock"


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


class PrefixFolder:
    """Block files below `path`, one folder per model, readable by their owner only.

    Evicts the least recently used blocks; a file's modification time is its last use.
    Thread-safe; all methods block on the disk, so engine threads must not call them.
    """

    def __init__(
        self,
        path: Path,
        limits: DiskLimits,
        *,
        now: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._path = path
        self._limits = limits
        self._now = now
        self._free_bytes = free_bytes or (lambda place: shutil.disk_usage(place).free)

    def scan(self, model: str, fingerprint: bytes) -> tuple[dict[Path, BlockHead], int]:
        """Return the model's blocks, and how many blocks of other versions were deleted.

        Also deletes damaged files and temporary files of killed processes, so call it on the
        writer thread.
        """
        found: dict[Path, BlockHead] = {}
        others = 0
        folder = self._path / model
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.suffix != SUFFIX:
                _delete_stale(path)
                continue
            try:
                head = read_head(path)
            except (DamagedBlock, OSError) as problem:
                logger.warning("deleting a damaged prefix block: %s", problem)
                _unlink(path)
                continue
            if head.fingerprint == fingerprint and head.key.hex() == path.stem:
                found[path] = head
            else:
                others += 1
                _unlink(path)
        return found, others

    def write(
        self, model: str, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]
    ) -> WriteResult:
        """Write blocks, evicting old ones if needed; blocks that exceed a limit are skipped.

        Raises OSError if the folder cannot be used.
        """
        result = WriteResult()
        with self._locked() as state:
            files = self._files()
            total = sum(size for _, size, _ in files)
            files.sort(reverse=True)
            for head, data in blocks:
                size = file_bytes(head)
                path = self._path / model / f"{head.key.hex()}{SUFFIX}"
                if size > self._limits.size_bytes or not self._may_write(state, size):
                    continue
                while files and (total + size > self._limits.size_bytes or self._is_full(size)):
                    _, freed, oldest = files.pop()
                    _unlink(oldest)
                    result.dropped.add(oldest)
                    total -= freed
                if self._is_full(size):
                    continue
                _make_private(path.parent)
                write_block(path, head, data)
                state.written_bytes += size
                total += size
                result.paths[head.key] = path
        return result

    def _may_write(self, state: _State, size: int) -> bool:
        day = int(self._now() // _DAY_S)
        if state.day != day:
            state.day, state.written_bytes = day, 0
        return state.written_bytes + size <= self._limits.max_daily_bytes

    def _is_full(self, size: int) -> bool:
        return self._free_bytes(self._path) - size < self._limits.floor_bytes

    def read(self, path: Path, head: BlockHead) -> NDArray[np.uint8] | None:
        """Return a block's state; None if it is missing, too large, or damaged (then deleted)."""
        try:
            return read_state(path, head)
        except (FileNotFoundError, MemoryError):
            return None
        except (DamagedBlock, OSError) as problem:
            logger.warning("deleting a damaged prefix block: %s", problem)
            _unlink(path)
            return None

    def touch(self, paths: Sequence[Path]) -> None:
        """Mark a chain of blocks as used; its first block will be evicted last."""
        moment = int(self._now() * 1e9)
        for index, path in enumerate(paths):
            # Another process may have deleted it.
            with suppress(OSError):
                os.utime(path, ns=(moment - index, moment - index))

    def claim_ram(self, wanted_bytes: int, limit_bytes: int) -> int:
        """Reserve RAM from the limit that all processes share; return the granted bytes.

        Replaces this process's earlier reservation.  Raises OSError.
        """
        mine = str(os.getpid())
        with self._locked() as state:
            others = {
                pid: size
                for pid, size in state.ram_bytes.items()
                if pid != mine and psutil.pid_exists(int(pid))
            }
            granted = max(min(wanted_bytes, limit_bytes - sum(others.values())), 0)
            state.ram_bytes = {**others, mine: granted}
        return granted

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return (time of last use in ns, size in bytes, path) of all blocks."""
        found = []
        for path in self._path.glob(f"*/*{SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    @contextmanager
    def _locked(self) -> Iterator[_State]:
        """Lock the folder, yield the shared state, and save it at the end."""
        _make_private(self._path)
        with _open_private(self._path / _LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self._read_state()
            try:
                yield state
            finally:
                self._save_state(state)

    def _read_state(self) -> _State:
        try:
            known = json.loads((self._path / _STATE).read_text("utf-8"))
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
        with _open_private(scratch, "w") as out:
            out.write(text)
        scratch.replace(self._path / _STATE)


def _make_private(folder: Path) -> None:
    """Create the folder, or restrict an existing one, with mode 0700."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _open_private(path: Path, mode: str) -> IO[str]:
    return open(path, mode, encoding="utf-8", opener=lambda name, how: os.open(name, how, 0o600))


def _delete_stale(path: Path) -> None:
    """Delete a temporary file whose writer is dead, or had the process id that is now ours."""
    writer = writer_of(path)
    if writer == os.getpid() or (writer is not None and not psutil.pid_exists(writer)):
        _unlink(path)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
