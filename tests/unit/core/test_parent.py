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
