"""Tests of waiting for other processes and of ending with the parent."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

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
