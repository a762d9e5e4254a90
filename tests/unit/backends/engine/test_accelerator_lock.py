"""Turns between processes, seen from one of them; the other is a process that does as told."""

import fcntl
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backends.engine.accelerator_lock import AcceleratorLock
from core.errors import Unavailable

OTHER = """
import sys
from pathlib import Path
from backends.engine.accelerator_lock import AcceleratorLock

lock = AcceleratorLock(Path(sys.argv[1]))
lock.register()
turn = None
print("ready", flush=True)
for line in sys.stdin:
    match line.strip():
        case "enter":
            turn = lock.turn()
            turn.__enter__()
        case "leave":
            turn.__exit__(None, None, None)
        case "close":
            lock.close()
    print("done", flush=True)
"""


class Other:
    """Another registered process."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hear()

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def hear(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def do(self, order: str) -> None:
        self.tell(order)
        self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def other_process(path: Path) -> Iterator[Other]:
    other = Other(path)
    try:
        yield other
    finally:
        other.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "turns"


@pytest.fixture
def lock(path: Path) -> Iterator[AcceleratorLock]:
    lock = AcceleratorLock(path, patience_s=20)
    lock.register()
    yield lock
    lock.close()


class Taker:
    """A thread that takes one turn and holds it until told."""

    def __init__(self, lock: AcceleratorLock) -> None:
        self.has_turn = threading.Event()
        self.may_leave = threading.Event()
        self._lock = lock
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._lock.turn():
            self.has_turn.set()
            self.may_leave.wait(20)

    def leave(self) -> None:
        self.may_leave.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def next_ticket(path: Path) -> int:
    """Read in another process: closing the file in this one would drop its locks."""
    read = "import struct, sys; print(struct.unpack('3Q', open(sys.argv[1], 'rb').read(24))[1])"
    return int(subprocess.check_output([sys.executable, "-c", read, str(path)]))


def comes_in_order(lock: AcceleratorLock, other: Other) -> bool:
    """Whether the other process waits for a turn that is held here."""
    with lock.turn():
        other.tell("enter")
        assert other.process.stdout is not None
        is_waiting = not select.select([other.process.stdout], [], [], 0.1)[0]
    other.hear()
    other.do("leave")
    return is_waiting


def refuse(*_: Any) -> None:
    raise AssertionError("a system call")


def test_alone_no_system_call(lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse)
        with lock.turn(), lock.turn():
            pass
    assert lock.engines() == 1


def test_unregistered_takes_no_turn(path: Path) -> None:
    lock = AcceleratorLock(path)
    with other_process(path) as one, other_process(path):
        one.do("enter")
        with lock.turn():
            assert lock.engines() == 2
    lock.close()


def test_two_processes_lock(
    path: Path, lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_process(path):
        assert lock.engines() == 2
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "lockf", refuse)
            with pytest.raises(AssertionError, match="a system call"), lock.turn():
                pass


def test_waits_for_other_process(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        other.do("enter")
        taker = Taker(lock)
        assert not taker.has_turn.wait(0.2)
        other.do("leave")
        assert taker.has_turn.wait(20)
        taker.leave()


def test_waiter_goes_before_a_second_turn(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        first = Taker(lock)
        assert first.has_turn.wait(20)
        other.tell("enter")
        wait_until(lambda: next_ticket(path) == 3)
        second = Taker(lock)
        first.leave()
        other.hear()
        assert not second.has_turn.wait(0.2)
        other.do("leave")
        assert second.has_turn.wait(20)
        second.leave()


def test_threads_of_one_process_queue(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path):
        first = Taker(lock)
        assert first.has_turn.wait(20)
        second = Taker(lock)
        assert not second.has_turn.wait(0.2)
        first.leave()
        assert second.has_turn.wait(20)
        second.leave()


def test_killed_holder_frees_the_turn(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        other.do("enter")
        taker = Taker(lock)
        assert not taker.has_turn.wait(0.1)
        other.kill()
        assert taker.has_turn.wait(20)
        taker.leave()
    assert lock.engines() == 1


def test_the_dead_are_forgotten_in_passing(
    path: Path, lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_process(path) as other:
        other.kill()
    for _ in range(256):
        with lock.turn():
            pass
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock.turn():
        pass
    monkeypatch.undo()


def test_registering_waits_for_a_lone_step(path: Path, lock: AcceleratorLock) -> None:
    alone = Taker(lock)
    assert alone.has_turn.wait(20)
    others: list[Other] = []
    starter = threading.Thread(target=lambda: others.append(Other(path)))
    starter.start()
    wait_until(lambda: lock.engines() == 2)
    starter.join(0.2)
    assert not others
    alone.leave()
    starter.join(20)
    assert others
    others[0].kill()


def test_hung_holder_is_passed_by(path: Path) -> None:
    lock = AcceleratorLock(path, patience_s=0.2)
    lock.register()
    with other_process(path) as other:
        other.do("enter")
        for _ in range(3):
            Taker(lock).leave()
        other.do("leave")
        wait_until(lambda: comes_in_order(lock, other))
    lock.close()


def test_close_unregisters(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        assert lock.engines() == 2
        other.do("close")
        assert lock.engines() == 1
    lock.close()
    lock.close()


def test_register_twice_counts_once(lock: AcceleratorLock) -> None:
    lock.register()
    assert lock.engines() == 1


def test_damaged_file_is_made_new(path: Path) -> None:
    path.write_bytes(os.urandom(4000))
    lock = AcceleratorLock(path)
    lock.register()
    with other_process(path) as other:
        assert lock.engines() == 2
        other.do("enter")
        other.do("leave")
        with lock.turn():
            pass
    lock.close()


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "missing/turns"):
        with pytest.raises(Unavailable, match="cannot be used"):
            AcceleratorLock(tmp_path / name)
    assert (tmp_path / "target").stat().st_size == 0


def test_failed_step_gives_the_turn_back(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        with pytest.raises(ValueError, match="broken"), lock.turn():
            raise ValueError("broken")
        other.do("enter")
        other.do("leave")
