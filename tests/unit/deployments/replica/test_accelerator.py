"""A format's process enters the order of turns with its first engine, and leaves it at its end."""

from pathlib import Path
from typing import Any

import pytest

from backends.engine.accelerator_lock import AcceleratorLock
from core.errors import Unavailable
from deployments.replica.accelerator import SharedAccelerator, turn_file


class Taking:
    """An engine that takes turns."""

    def __init__(self) -> None:
        self.locks: list[AcceleratorLock] = []
        self.is_closed = False

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        self.locks.append(lock)

    async def close(self) -> None:
        self.is_closed = True


async def test_engines_of_a_process_share_one_place(tmp_path: Path) -> None:
    turns = SharedAccelerator(tmp_path)
    engines: list[Any] = [Taking(), Taking()]
    for engine in engines:
        await turns.share(engine)
    (first,), (second,) = (engine.locks for engine in engines)
    assert first is second
    assert first.process_count() == 1
    await turns.close()
    after = AcceleratorLock(turn_file(tmp_path))
    assert after.process_count() == 0
    after.close()


async def test_an_engine_without_steps_needs_no_place(tmp_path: Path) -> None:
    turns = SharedAccelerator(tmp_path)
    engine: Any = object()
    await turns.share(engine)
    await turns.close()
    assert not turn_file(tmp_path).exists()


async def test_an_engine_is_closed_where_the_file_cannot_be_used(tmp_path: Path) -> None:
    turn_file(tmp_path).mkdir(parents=True)
    engine: Any = Taking()
    with pytest.raises(Unavailable, match="cannot be used"):
        await SharedAccelerator(tmp_path).share(engine)
    assert engine.is_closed
    assert not engine.locks
