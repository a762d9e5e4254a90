"""A format's process enters the order of turns with its first engine, and leaves it at its end."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from backends.engine.accelerator_lock import AcceleratorLock
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


async def test_without_a_usable_file_engines_run_without_turns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turn_file(tmp_path).mkdir(parents=True)
    turns = SharedAccelerator(tmp_path)
    engine: Any = Taking()
    await turns.share(engine)
    assert not engine.is_closed
    assert not engine.locks
    assert "does not take turns" in caplog.text
    # The next engine tries again.
    turn_file(tmp_path).rmdir()
    await turns.share(engine)
    assert engine.locks
    await turns.close()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EMFILE])
async def test_a_disk_that_refuses_the_file_costs_turns_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    engine: Any = Taking()
    opened = len(os.listdir("/dev/fd"))
    for name in ("pathlib.Path.mkdir", "backends.engine.accelerator_lock.allocate"):
        with monkeypatch.context() as patch:
            patch.setattr(name, refuse)
            await SharedAccelerator(tmp_path).share(engine)
    assert not engine.locks
    assert len(os.listdir("/dev/fd")) == opened


async def test_a_lock_whose_thread_has_ended_is_told(tmp_path: Path) -> None:
    turns = SharedAccelerator(tmp_path)
    engine: Any = Taking()
    assert turns.problem == ""
    await turns.share(engine)
    assert turns.problem == ""
    lock = engine.locks[0]
    # What ends the thread is a bug that nobody knows yet; here it is told to end.
    lock._requests.put(None)
    lock._waiter.join(30)
    assert "has ended" in turns.problem
    lock._is_closed = True
    assert turns.problem == ""


async def test_a_model_that_is_opened_takes_turns_with_running_engines(tmp_path: Path) -> None:
    running, opening = SharedAccelerator(tmp_path), SharedAccelerator(tmp_path)
    engine: Any = Taking()
    await running.share(engine)
    hold = opening.holder()
    assert engine.locks[0].process_count() == 1
    with hold():
        assert engine.locks[0].process_count() == 1
    await opening.share(Taking())  # type: ignore[arg-type]
    await opening.close()
    await running.close()


async def test_without_a_usable_file_a_model_is_tried_without_turns_and_once_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turn_file(tmp_path).mkdir(parents=True)
    hold = SharedAccelerator(tmp_path).holder()
    for _ in range(3):
        with hold():
            pass
    assert caplog.text.count("does not take turns") == 1
