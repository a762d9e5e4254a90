"""The turn lock between real processes: order, exclusion, and holders that are killed."""

import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from backends.engine.accelerator_lock import AcceleratorLock

# Reads a number, dawdles, writes it back one higher: two at once would see it change.
WORKER = """
import os, struct, sys, time
from pathlib import Path
from backends.engine.accelerator_lock import AcceleratorLock

folder, name, turns = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
lock = AcceleratorLock(folder / "turns")
lock.register()
shared = os.open(folder / "shared", os.O_RDWR)
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(turns):
    with lock.hold():
        number, _ = struct.unpack("qq", os.pread(shared, 16, 0))
        mine = struct.pack("qq", number, os.getpid())
        os.pwrite(shared, mine, 0)
        # Time for the others to ask again, also where they wait for a processor.
        time.sleep(0.01)
        if os.pread(shared, 16, 0) != mine:
            os.write(log, b"!")
        os.pwrite(shared, struct.pack("qq", number + 1, 0), 0)
        os.write(log, name.encode())
lock.close()
"""


class Workers:
    """Processes that take turns, and what they leave in their folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[int, subprocess.Popen[str]] = {}
        (folder / "shared").write_bytes(bytes(16))
        (folder / "log").touch()

    def add(self, name: str, turns: int) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(self.folder), name, str(turns)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running[worker.pid] = worker
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        return worker

    def go(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()

    def kill(self, pid: int) -> None:
        worker = self.running.pop(pid)
        worker.kill()
        worker.communicate()

    @property
    def done(self) -> int:
        """Turns that came to their end."""
        return self._shared()[0]

    def has_done(self, turns: int) -> bool:
        return self.done >= turns

    @property
    def holder(self) -> int:
        """Process id of who is inside; 0 for nobody."""
        return self._shared()[1]

    def _shared(self) -> tuple[int, int]:
        number, holder = struct.unpack("qq", (self.folder / "shared").read_bytes())
        return number, holder

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(tmp_path)
    yield workers
    for pid in list(workers.running):
        workers.kill(pid)


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_turns_go_round(workers: Workers, names: str) -> None:
    started = [workers.add(name, 60) for name in names]
    for worker in started:
        workers.go(worker)
    for worker in started:
        assert worker.wait(60) == 0
    log = workers.log
    assert Counter(log) == dict.fromkeys(names, 60)
    # While all want it: from where the last one came in to where the first one is through.
    begin = max(log.index(name) for name in names)
    contended = log[begin : min(log.rindex(name) for name in names)]
    shares = Counter(contended)
    assert min(shares[name] for name in names) >= 0.8 * max(shares.values())
    rounds = [contended[at : at + len(names)] for at in range(len(contended) - len(names) + 1)]
    assert sum(len(set(turns)) == len(names) for turns in rounds) >= 0.8 * len(rounds)


def test_killed_holders_neither_block_nor_let_two_in(workers: Workers) -> None:
    chance = random.Random(7)
    for _ in range(3):
        workers.go(workers.add("x", 1_000_000))
    for round_number in range(10):
        goal = workers.done + chance.randrange(20)
        wait_until(partial(workers.has_done, goal))
        wait_until(lambda: workers.holder in workers.running)
        # Every other time one that waits, as far as chance has it.
        holder = workers.holder
        others = [pid for pid in workers.running if pid != holder]
        is_holder = round_number % 2 == 0 and holder in workers.running
        workers.kill(holder if is_holder else chance.choice(others))
        workers.go(workers.add("x", 1_000_000))
    wait_until(partial(workers.has_done, workers.done + 20))
    lock = AcceleratorLock(workers.folder / "turns")
    lock.register()
    assert lock.process_count() == 4
    for pid in list(workers.running):
        workers.kill(pid)
    assert lock.process_count() == 1
    lock.close()
    assert "!" not in workers.log
    assert workers.done - 13 <= len(workers.log) <= workers.done


def test_stopped_holder_is_passed_by(workers: Workers) -> None:
    worker = workers.add("x", 1_000_000)
    workers.go(worker)
    lock = AcceleratorLock(workers.folder / "turns", timeout_s=0.3)
    lock.register()
    wait_until(lambda: workers.holder == worker.pid)
    worker.send_signal(signal.SIGSTOP)
    for _ in range(50):
        with lock.hold():
            pass
    workers.kill(worker.pid)
    assert lock.process_count() == 1
    lock.close()
