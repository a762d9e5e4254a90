"""Blocks of computed prefixes on disk, in one folder that all processes of a server share."""

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
# One day may write the whole allowance so many times, so that no loop wears a disk out.
DAILY_FILLS = 4
_DAY_S = 86_400
_STATE = "state.json"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes: of all files, that stay free on the disk, and that are written in one day."""

    size_bytes: int
    floor_bytes: int = FLOOR_BYTES
    daily_bytes: int | None = None

    @property
    def most_daily_bytes(self) -> int:
        """What one day may write."""
        return self.size_bytes * DAILY_FILLS if self.daily_bytes is None else self.daily_bytes


@dataclass(slots=True)
class Written:
    """What a write did: the files by the blocks' keys, and those that had to go for them."""

    paths: dict[bytes, Path] = field(default_factory=dict)
    dropped: set[Path] = field(default_factory=set)


@dataclass(slots=True)
class _State:
    """What the processes share: the day, its written bytes, and each process's RAM."""

    day: int = 0
    written_bytes: int = 0
    ram_bytes: dict[str, int] = field(default_factory=dict)


class PrefixFolder:
    """Files below `path`, one folder for each model; only their owner may read them.

    The least recently used go first, their modification time being that of the last use.  Thread-
    safe; everything blocks on the disk, so no engine's thread calls it.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits,
        *,
        now: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._path = path
        self._limits = limits
        self._now = now
        self._free_bytes = free_bytes or (lambda place: shutil.disk_usage(place).free)

    def scan(self, model: str, fingerprint: bytes) -> tuple[dict[Path, BlockHead], int]:
        """Return the model's blocks, and how many of other versions of it were dropped.

        Damaged files and what killed processes left half-written are dropped as well; so it is for
        the thread that writes.
        """
        found: dict[Path, BlockHead] = {}
        others = 0
        folder = self._path / model
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.suffix != SUFFIX:
                _sweep(path)
                continue
            try:
                head = read_head(path)
            except (DamagedBlock, OSError) as problem:
                logger.warning("a computed prefix is dropped: %s", problem)
                _unlink(path)
                continue
            if head.fingerprint == fingerprint and head.key.hex() == path.stem:
                found[path] = head
            else:
                others += 1
                _unlink(path)
        return found, others

    def write(self, model: str, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]) -> Written:
        """Write blocks, dropping old ones for them; those that no limit allows are left out.

        Raises OSError where the folder cannot be used.
        """
        result = Written()
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
        return state.written_bytes + size <= self._limits.most_daily_bytes

    def _is_full(self, size: int) -> bool:
        return self._free_bytes(self._path) - size < self._limits.floor_bytes

    def read(self, path: Path, head: BlockHead) -> NDArray[np.uint8] | None:
        """Return a block's state; None where it is gone, too large, or damaged, which drops it."""
        try:
            return read_state(path, head)
        except (FileNotFoundError, MemoryError):
            return None
        except (DamagedBlock, OSError) as problem:
            logger.warning("a computed prefix is dropped: %s", problem)
            _unlink(path)
            return None

    def touch(self, paths: Sequence[Path]) -> None:
        """Note that a chain of blocks is used, the first block being the last to go."""
        moment = int(self._now() * 1e9)
        for index, path in enumerate(paths):
            # Another process may have dropped it.
            with suppress(OSError):
                os.utime(path, ns=(moment - index, moment - index))

    def claim_ram(self, wanted_bytes: int, limit_bytes: int) -> int:
        """Take so much of the RAM that all processes may use together; return what is granted.

        What this process had before is replaced.  Raises OSError.
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
        """Return (time of last use, bytes, path) of all blocks."""
        found = []
        for path in self._path.glob(f"*/*{SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    @contextmanager
    def _locked(self) -> Iterator[_State]:
        """Hold the folder alone, with what the processes share, which is kept at the end."""
        _make_private(self._path)
        with _open_private(self._path / _LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self._read_state()
            try:
                yield state
            finally:
                self._keep_state(state)

    def _read_state(self) -> _State:
        try:
            known = json.loads((self._path / _STATE).read_text("utf-8"))
            ram = {str(int(pid)): int(size) for pid, size in known["ram_bytes"].items()}
            return _State(int(known["day"]), int(known["written_bytes"]), ram)
        except FileNotFoundError:
            return _State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            logger.warning("the state of the prefix folder is lost: %r", problem)
            return _State()

    def _keep_state(self, state: _State) -> None:
        text = json.dumps({
            "day": state.day, "written_bytes": state.written_bytes, "ram_bytes": state.ram_bytes,
        })  # fmt: skip
        scratch = self._path / f"{_STATE}.tmp"
        with _open_private(scratch, "w") as out:
            out.write(text)
        scratch.replace(self._path / _STATE)


def _make_private(folder: Path) -> None:
    """Have a folder that only its owner can enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _open_private(path: Path, mode: str) -> IO[str]:
    return open(path, mode, encoding="utf-8", opener=lambda name, how: os.open(name, how, 0o600))


def _sweep(path: Path) -> None:
    """Drop a half-written file whose writer is dead, or was this process's number before."""
    writer = writer_of(path)
    if writer == os.getpid() or (writer is not None and not psutil.pid_exists(writer)):
        _unlink(path)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
