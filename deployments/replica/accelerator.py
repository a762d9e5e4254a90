"""Turns on the machine's accelerator, between the processes of one application."""

import asyncio
import platform
from pathlib import Path

from backends.base import Engine
from backends.engine.accelerator_lock import AcceleratorLock, SharesAccelerator
from core.errors import ImpetusError


def turn_file(home: Path) -> Path:
    """Return the file that this machine's processes share; other machines may see the folder."""
    return home / "cache" / f"turns-{platform.node()}"


class SharedAccelerator:
    """This process's place in the order; taken when the first engine needs it.

    A process that is alone makes no system call for its turns.
    """

    def __init__(self, home: Path) -> None:
        self._path = turn_file(home)
        self._lock: AcceleratorLock | None = None

    async def share(self, engine: Engine) -> None:
        """Make a new engine take turns if it can.

        Raises Unavailable, having closed the engine, where the file cannot be used.
        """
        if not isinstance(engine, SharesAccelerator):
            return
        try:
            lock = await asyncio.to_thread(self._registered)
        except ImpetusError:
            await engine.close()
            raise
        engine.share_accelerator(lock)

    def _registered(self) -> AcceleratorLock:
        if self._lock is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = AcceleratorLock(self._path)
        self._lock.register()
        return self._lock

    async def close(self) -> None:
        """Leave the order; call it once the engines are closed."""
        if self._lock is not None:
            await asyncio.to_thread(self._lock.close)
