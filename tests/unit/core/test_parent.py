"""Tests of waiting for other processes and of ending with the parent."""

import errno
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from core import parent
from core.parent import is_running, wait_for_exit

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 30.0


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


@pytest.mark.parametrize("way", ["event", "poll"])
def test_the_wait_ends_when_the_process_has_exited(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "poll":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.delattr("select.kqueue", raising=False)
        monkeypatch.setattr(parent, "_POLL_S", 0.01)
    process = sleeper()
    waiter = threading.Thread(target=wait_for_exit, args=(process.pid,), daemon=True)
    waiter.start()
    assert is_running(process.pid)
    process.kill()
    process.wait()
    waiter.join(LIMIT_S)
    assert not waiter.is_alive()
    assert not is_running(process.pid)


def test_a_process_that_has_exited_before_is_not_waited_for() -> None:
    process = sleeper()
    process.kill()
    process.wait()
    wait_for_exit(process.pid)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waitid without reaping is Linux's")
def test_a_zombie_has_exited() -> None:
    process = sleeper()
    waiter = threading.Thread(target=wait_for_exit, args=(process.pid,), daemon=True)
    waiter.start()
    process.kill()
    options = os.WEXITED | os.WNOWAIT  # type: ignore[attr-defined,unused-ignore]
    os.waitid(os.P_PID, process.pid, options)  # type: ignore[attr-defined,unused-ignore]
    waiter.join(LIMIT_S)
    is_waiting = waiter.is_alive()
    process.wait()
    assert not is_waiting


@pytest.mark.parametrize("number", [0, errno.ESRCH, errno.EACCES])
def test_a_kqueue_tells_of_the_exit_or_of_an_error(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = SimpleNamespace(flags=0x4000 if number else 0, data=number)
    queue = SimpleNamespace(control=lambda *_: [event], close=lambda: None)
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(select, "kqueue", lambda: queue, raising=False)
    monkeypatch.setattr(select, "kevent", lambda *_, **__: event, raising=False)
    for name in ("FILTER_PROC", "EV_ADD", "EV_ONESHOT", "NOTE_EXIT"):
        monkeypatch.setattr(select, f"KQ_{name}", 1, raising=False)
    monkeypatch.setattr(select, "KQ_EV_ERROR", 0x4000, raising=False)
    asked: list[int] = []

    def is_running(pid: int) -> bool:
        asked.append(pid)
        return False

    monkeypatch.setattr(parent, "is_running", is_running)
    wait_for_exit(4711)
    # Only where the system refuses to tell is the process asked.
    assert asked == ([4711] if number == errno.EACCES else [])


def test_the_wait_for_several_ends_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.delattr("select.kqueue", raising=False)
    monkeypatch.setattr(parent, "_POLL_S", 0.01)

    def is_running(pid: int) -> bool:
        asked.append(pid)
        return pid != 2

    monkeypatch.setattr(parent, "is_running", is_running)
    wait_for_exit(1, 2, 3)
    assert asked == [1, 2]
    monkeypatch.undo()
    processes = [sleeper() for _ in range(2)]
    waiter = threading.Thread(target=wait_for_exit, args=[each.pid for each in processes])
    waiter.start()
    processes[1].kill()
    waiter.join(LIMIT_S)
    is_waiting = waiter.is_alive()
    for each in processes:
        each.kill()
        each.wait()
    waiter.join()
    assert not is_waiting


WATCHED = """
import ctypes, os, sys
from core.parent import kill_group_with_parent
kill_group_with_parent(int(sys.argv[1]) or os.getppid())
os.write(1, b"%d\\n" % os.getpid())
ctypes.PyDLL(None).sleep(600)
"""
STARTER = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], str(os.getpid())],
    stdout=subprocess.PIPE, start_new_session=True,
)
print(child.stdout.readline().decode().strip(), flush=True)
time.sleep(600)
"""


def test_a_group_is_killed_with_its_parent_although_it_keeps_the_interpreters_lock() -> None:
    command = [sys.executable, "-c", STARTER, WATCHED]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        worker = psutil.Process(int(starter.stdout.readline()))
        group = [worker, *worker.children()]
        assert len(group) == 2
        starter.kill()
        gone, alive = psutil.wait_procs(group, LIMIT_S)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    assert gone or alive


def test_a_groups_watcher_ends_with_it_and_keeps_no_pipe_open() -> None:
    command = [sys.executable, "-c", WATCHED, "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (watcher,) = psutil.Process(process.pid).children()
        process.kill()
        # The end of the pipe comes although the watcher was forked with it.
        assert process.stdout.read() == b""
        _, alive = psutil.wait_procs([watcher], LIMIT_S)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_group_whose_parent_exited_before_is_killed_at_once() -> None:
    command = [sys.executable, "-c", WATCHED, str(2**22 + 1)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        assert process.wait(LIMIT_S) == -signal.SIGKILL


CHILD = """
import signal, sys, time
from core.parent import exit_with_parent
{prepare}
exit_with_parent(0.2, lambda: open({path!r}, "w").close())
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("prepare", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_process_exits_with_its_killed_parent(tmp_path: Path, prepare: str) -> None:
    path = tmp_path / "before"
    code = CHILD.format(prepare=prepare, path=str(path))
    middle = subprocess.Popen(
        [sys.executable, "-c", PARENT, code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert middle.stdout is not None
    child = psutil.Process(int(middle.stdout.readline()))
    middle.send_signal(signal.SIGKILL)
    middle.wait()
    middle.stdout.close()
    gone, _ = psutil.wait_procs([child], timeout=LIMIT_S)
    assert gone == [child]
    assert path.exists()
