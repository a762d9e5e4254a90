"""The lock between processes, seen from one of them; the other obeys commands on its stdin."""

import errno
import fcntl
import os
import selectors
import signal
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
held = None
print("ready", flush=True)
for line in sys.stdin:
    match line.strip():
        case "enter":
            held = lock.hold()
            held.__enter__()
        case "leave":
            held.__exit__(None, None, None)
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

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def hear(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def do(self, command: str) -> None:
        self.tell(command)
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
    return tmp_path / "lock"


@pytest.fixture
def lock(path: Path) -> Iterator[AcceleratorLock]:
    lock = AcceleratorLock(path, timeout_s=20)
    lock.register()
    yield lock
    lock.close()


class Holder:
    """A thread that acquires the lock and holds it until told."""

    def __init__(self, lock: AcceleratorLock) -> None:
        self.is_holder = threading.Event()
        self.may_release = threading.Event()
        self._lock = lock
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._lock.hold():
            self.is_holder.set()
            self.may_release.wait(20)

    def leave(self) -> None:
        self.may_release.set()
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
    """Whether the other process waits for the lock that is held here."""
    with lock.hold():
        other.tell("enter")
        assert other.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(other.process.stdout, selectors.EVENT_READ)
            is_waiting = not selector.select(0.1)
    other.hear()
    other.do("leave")
    return is_waiting


def refuse(*_: Any) -> None:
    raise AssertionError("a system call")


def test_alone_no_system_call(lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse)
        with lock.hold(), lock.hold():
            pass
    assert lock.process_count() == 1


def test_an_unregistered_process_does_not_lock(path: Path) -> None:
    lock = AcceleratorLock(path)
    with other_process(path) as one, other_process(path):
        one.do("enter")
        with lock.hold():
            assert lock.process_count() == 2
    lock.close()


def test_two_processes_lock(
    path: Path, lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_process(path):
        assert lock.process_count() == 2
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "lockf", refuse)
            with pytest.raises(AssertionError, match="a system call"), lock.hold():
                pass


def test_waits_for_other_process(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        other.do("enter")
        holder = Holder(lock)
        assert not holder.is_holder.wait(0.2)
        other.do("leave")
        assert holder.is_holder.wait(20)
        holder.leave()


def test_a_waiter_goes_before_a_former_holder(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        first = Holder(lock)
        assert first.is_holder.wait(20)
        other.tell("enter")
        wait_until(lambda: next_ticket(path) == 3)
        second = Holder(lock)
        first.leave()
        other.hear()
        assert not second.is_holder.wait(0.2)
        other.do("leave")
        assert second.is_holder.wait(20)
        second.leave()


def test_threads_of_one_process_queue(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path):
        first = Holder(lock)
        assert first.is_holder.wait(20)
        second = Holder(lock)
        assert not second.is_holder.wait(0.2)
        first.leave()
        assert second.is_holder.wait(20)
        second.leave()


def test_a_killed_holder_releases_the_lock(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        other.do("enter")
        holder = Holder(lock)
        assert not holder.is_holder.wait(0.1)
        other.kill()
        assert holder.is_holder.wait(20)
        holder.leave()
    assert lock.process_count() == 1


def test_dead_processes_are_unregistered_in_passing(
    path: Path, lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_process(path) as other:
        other.kill()
    for _ in range(256):
        with lock.hold():
            pass
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock.hold():
        pass
    monkeypatch.undo()


def test_registering_waits_for_an_unlocked_step(path: Path, lock: AcceleratorLock) -> None:
    alone = Holder(lock)
    assert alone.is_holder.wait(20)
    others: list[Other] = []
    starter = threading.Thread(target=lambda: others.append(Other(path)))
    starter.start()
    wait_until(lambda: lock.process_count() == 2)
    starter.join(0.2)
    assert not others
    alone.leave()
    starter.join(20)
    assert others
    others[0].kill()


def test_a_hung_holder_is_passed_by(path: Path) -> None:
    lock = AcceleratorLock(path, timeout_s=0.2)
    lock.register()
    with other_process(path) as other:
        other.do("enter")
        for _ in range(3):
            Holder(lock).leave()
        other.do("leave")
        wait_until(lambda: comes_in_order(lock, other))
    lock.close()


def test_close_unregisters(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        assert lock.process_count() == 2
        other.do("close")
        assert lock.process_count() == 1
    lock.close()
    lock.close()


def test_register_twice_counts_once(lock: AcceleratorLock) -> None:
    lock.register()
    assert lock.process_count() == 1


def test_damaged_file_is_made_new(path: Path) -> None:
    path.write_bytes(os.urandom(4000))
    lock = AcceleratorLock(path)
    lock.register()
    with other_process(path) as other:
        assert lock.process_count() == 2
        other.do("enter")
        other.do("leave")
        with lock.hold():
            pass
    lock.close()


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "missing/lock"):
        with pytest.raises(Unavailable, match="cannot be used"):
            AcceleratorLock(tmp_path / name)
    assert (tmp_path / "target").stat().st_size == 0


def test_a_failed_step_releases_the_lock(path: Path, lock: AcceleratorLock) -> None:
    with other_process(path) as other:
        with pytest.raises(ValueError, match="broken"), lock.hold():
            raise ValueError("broken")
        other.do("enter")
        other.do("leave")


def damage(path: Path, how: str) -> None:
    """In another process: closing the file in this one would drop its locks."""
    code = {
        "empty": "os.truncate(path, 0)",
        "short": "os.truncate(path, 40)",
        "zeros": "os.pwrite(os.open(path, os.O_WRONLY), bytes(2000), 0)",
        "noise": "os.pwrite(os.open(path, os.O_WRONLY), os.urandom(2000), 0)",
        "deleted": "os.unlink(path)",
        "replaced": "open(path + '.new', 'w').close(); os.rename(path + '.new', path)",
    }[how]
    subprocess.run(
        [sys.executable, "-c", f"import os, sys; path = sys.argv[1]; {code}", str(path)], check=True
    )


DAMAGES = ["empty", "short", "zeros", "noise", "deleted", "replaced"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_is_damaged_under_us_costs_no_step(
    path: Path, lock: AcceleratorLock, how: str
) -> None:
    """Nothing hangs, nobody dies, and turns are taken again."""
    with other_process(path) as other:
        other.do("enter")
        damage(path, how)
        other.do("leave")
        for _ in range(600):
            with lock.hold():
                pass
        for _ in range(300):
            other.do("enter")
            other.do("leave")
        wait_until(lambda: comes_in_order(lock, other))
    assert lock.process_count() == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_is_damaged_while_it_is_held(path: Path, how: str) -> None:
    lock = AcceleratorLock(path, timeout_s=1)
    lock.register()
    with other_process(path) as other:
        other.do("enter")
        waiting = Holder(lock)
        damage(path, how)
        with lock.hold():
            pass
        other.do("leave")
        waiting.leave()
    lock.close()


def test_a_stopped_holder_is_passed_by_and_its_death_restores_the_order(path: Path) -> None:
    lock = AcceleratorLock(path, timeout_s=0.2)
    lock.register()
    with other_process(path) as other, other_process(path) as third:
        other.do("enter")
        other.process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            Holder(lock).leave()
        other.kill()
        wait_until(lambda: comes_in_order(lock, third))
    lock.close()


def test_descriptors_are_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = len(os.listdir("/dev/fd"))
    for _ in range(5):
        lock = AcceleratorLock(path)
        lock.register()
        lock.close()
        lock.close()
    path.unlink()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("backends.engine.accelerator_lock.allocate", full)
    with pytest.raises(Unavailable, match="the disk is full"):
        AcceleratorLock(path)
    assert len(os.listdir("/dev/fd")) == opened


def test_a_holder_that_hangs_leaves_no_descriptor_once_it_goes_on(path: Path) -> None:
    opened = len(os.listdir("/dev/fd"))
    lock = AcceleratorLock(path, timeout_s=0.2)
    lock.register()
    with other_process(path) as other:
        other.do("enter")
        with lock.hold():
            pass
        lock.close()
    wait_until(lambda: len(os.listdir("/dev/fd")) == opened)


def test_a_file_that_can_no_longer_be_written_costs_no_step(
    path: Path, lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with other_process(path) as other:
        for name in ("pwrite", "pread"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                for _ in range(3):
                    with lock.hold():
                        pass
        wait_until(lambda: comes_in_order(lock, other))


def test_the_file_takes_its_room_at_once(path: Path) -> None:
    lock = AcceleratorLock(path)
    status = path.stat()
    assert status.st_blocks * 512 >= status.st_size > 1000
    lock.close()


def test_a_registry_in_use_delays_the_new_registration_only(
    path: Path, lock: AcceleratorLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_process(path) as other:
        damage(path, "zeros")
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_lock_registry", lambda: False)
            with lock.hold():
                pass
        for _ in range(300):
            with lock.hold():
                pass
        other.do("enter")
        other.do("leave")
        wait_until(lambda: comes_in_order(lock, other))
