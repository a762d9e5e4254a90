"""Shares the accelerator between the replica processes of one machine."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from backends.base import Engine
from backends.engine.accelerator_lock import AcceleratorLock, SharesAccelerator
from core.errors import ImpetusError
from core.files import why
from core.machine import machine_id

logger = logging.getLogger(__name__)


def turn_file(home: Path) -> Path:
    """Return the lock file of this machine; the folder may be shared with other machines.

    Not named after the host: macOS takes that name from the network, and processes that started
    under another one would not take turns.
    """
    return home / "cache" / f"turns-{machine_id()}"


class SharedAccelerator:
    """This process's registration for turns; made when the first engine needs it."""

    def __init__(self, home: Path) -> None:
        self._path = turn_file(home)
        self._lock: AcceleratorLock | None = None
        # Loads run on several threads.
        self._registering = threading.Lock()

    async def share(self, engine: Engine) -> None:
        """Make a new engine take turns, if it supports that.

        If the lock file cannot be used (read-only or full disk, a process that hangs), the engine
        runs without turns, which costs speed only; the next engine tries again.
        """
        if not isinstance(engine, SharesAccelerator):
            return
        lock = await asyncio.to_thread(self._registered)
        if lock is not None:
            engine.share_accelerator(lock)

    def holder(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what takes a turn for one pass of a model that is being opened; blocks.

        The process is registered with the first pass.
        """
        registered: list[AcceleratorLock | None] = []

        def hold() -> AbstractContextManager[None]:
            if not registered:
                registered.append(self._registered())
            lock = registered[0]
            return nullcontext() if lock is None else lock.hold()

        return hold

    def _registered(self) -> AcceleratorLock | None:
        """Return the lock with this process registered; None if its file cannot be used."""
        with self._registering:
            try:
                if self._lock is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._lock = AcceleratorLock(self._path)
                self._lock.register()
            except (ImpetusError, OSError) as problem:
                reason = why(problem) if isinstance(problem, OSError) else problem
                logger.warning("the engine does not take turns at the accelerator: %s", reason)
                return None
            return self._lock

    @property
    def problem(self) -> str:
        """Why engines of this process get no turns any more; empty if they do."""
        return "" if self._lock is None else self._lock.problem

    async def close(self) -> None:
        """Release the registration; call it after the engines are closed."""
        if self._lock is not None:
            await asyncio.to_thread(self._lock.close)
