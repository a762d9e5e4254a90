"""Tests of finding and ending a server's processes, and of the guard that does it from outside."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from core.child import SERVER_ID
from deployments.serve import guard as guard_module
from deployments.serve import processes as processes_module
from deployments.serve.guard import start_guard
from deployments.serve.members import Helpers, Members
from deployments.serve.processes import (
    end_processes,
    has_owner,
    is_alive,
    new_server_id,
    owner_of,
    processes_of,
    remember,
)

LIMIT_S = 30.0
SLEEP = "import time; print(1, flush=True); time.sleep(600)"
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP
# Starts a child in a session of its own, as Ray starts its processes.
NESTED = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
first_line: dict[int, bytes] = {}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, code: str, server_id: str = "", *words: str) -> psutil.Popen:
    """Start a process and return it once it has printed a line; see `first_line`."""
    environment = {**os.environ, **({SERVER_ID: server_id} if server_id else {})}
    process = psutil.Popen(
        [sys.executable, "-c", code, *words], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    first_line[process.pid] = process.stdout.readline()
    stack.callback(_end, process)
    return process


def _end(process: "psutil.Popen | subprocess.Popen[bytes]") -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_a_servers_id_names_its_owner() -> None:
    assert owner_of(new_server_id(4711)) == 4711
    assert new_server_id(1) != new_server_id(1)
    assert [owner_of(text) for text in ("", "x-1", "-5", "12")] == [0, 0, 0, 12]


def test_only_the_processes_with_the_id_are_found(stack: ExitStack) -> None:
    server_id, other_id = new_server_id(os.getpid()), new_server_id(os.getpid())
    process = start(stack, NESTED, server_id)
    start(stack, SLEEP, other_id)
    start(stack, SLEEP)
    child = int(first_line[process.pid])
    assert {found.pid for found in processes_of(server_id)} == {process.pid, child}
    end_processes(processes_of(server_id), 1.0)
    assert processes_of(server_id) == []
    assert len(processes_of(other_id)) == 1


def test_processes_of_another_container_are_not_this_servers(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_id = new_server_id(os.getpid())
    inner, outer = start(stack, SLEEP, server_id), start(stack, SLEEP, server_id)
    monkeypatch.setattr(
        processes_module, "_pid_namespace", lambda pid: 2 if pid == inner.pid else 1
    )
    assert [found.pid for found in processes_of(server_id)] == [outer.pid]


def test_a_system_without_pid_namespaces_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own = processes_module._pid_namespace(os.getpid())
    assert own == processes_module._pid_namespace(os.getppid())

    def refuse(path: str) -> os.stat_result:
        raise FileNotFoundError(path)

    monkeypatch.setattr("os.stat", refuse)
    assert processes_module._pid_namespace(os.getpid()) == 0


def test_what_ignores_sigterm_is_killed(stack: ExitStack) -> None:
    processes = [start(stack, IGNORE), start(stack, SLEEP)]
    end_processes(processes, 0.1)
    assert [process.wait() for process in processes] == [-signal.SIGKILL, -signal.SIGTERM]


def test_processes_that_ended_are_not_remembered(stack: ExitStack) -> None:
    ended, reused, living = (start(stack, SLEEP) for _ in range(3))
    processes = [psutil.Process(one.pid) for one in (ended, reused, living)]
    known = {one.pid: one for one in processes}
    for process in (ended, reused):
        process.kill()
        process.wait()
    # The system has given the id of one that ended to another process.
    another: Any = SimpleNamespace(pid=reused.pid, is_running=lambda: True)
    remember(known, [another])
    assert known == {reused.pid: another, living.pid: processes[2]}


def fake_ray(stack: ExitStack) -> dict[str, psutil.Popen]:
    """Start processes whose command lines look like those of Ray's."""
    marks = [
        *("/ray/gcs/gcs_server", "/ray/raylet/raylet", "/dashboard/agent.py"),
        *("/runtime_env/agent/main.py", "/dashboard/dashboard.py"),
    ]
    return {mark: start(stack, SLEEP, "", mark) for mark in marks}


def test_members_are_found_once_and_missed_when_they_end(stack: ExitStack) -> None:
    processes = fake_ray(stack)
    shown = [processes["/ray/gcs/gcs_server"]]
    members = Members(lambda: shown)
    members.look()
    assert not members.is_complete
    assert members.ended() == ""
    shown.extend(processes.values())
    members.look()
    assert members.is_complete
    # Serve works without the dashboard.
    processes["/dashboard/dashboard.py"].kill()
    processes["/dashboard/dashboard.py"].wait()
    assert members.ended() == ""
    # A zombie has ended too.
    raylet = processes["/ray/raylet/raylet"]
    raylet.kill()
    os.waitid(os.P_PID, raylet.pid, os.WEXITED | os.WNOWAIT)
    assert members.ended() == f"Ray's node manager (raylet), process {raylet.pid}"


@pytest.mark.parametrize("code", [SLEEP, IGNORE])
def test_the_guard_ends_the_server_when_its_owner_is_killed(stack: ExitStack, code: str) -> None:
    server_id = new_server_id(os.getpid())
    root = start(stack, code)
    orphan = start(stack, NESTED, server_id)
    guard = start_guard(root.pid, server_id, owned=True)
    stack.callback(_end, guard)
    assert guard.stdin is not None
    assert is_alive(root)
    guard.stdin.close()
    assert guard.wait(LIMIT_S) == 0
    assert [is_alive(process) for process in (root, orphan)] == [False, False]
    assert processes_of(server_id) == []


def test_a_guard_by_hand_ends_what_the_root_leaves_behind(stack: ExitStack) -> None:
    server_id = new_server_id(os.getpid())
    root = start(stack, SLEEP)
    left = start(stack, IGNORE, server_id)
    guard = start_guard(root.pid, server_id)
    stack.callback(_end, guard)
    assert is_alive(left)
    root.kill()
    root.wait()
    assert guard.wait(LIMIT_S) == 0
    assert left.wait(LIMIT_S) == -signal.SIGKILL


def test_a_guard_by_hand_notices_that_the_raylet_ended(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_POLL_S", 0.01)
    monkeypatch.setattr(guard_module, "_AFTER_ROOT_S", 0.05)
    root = start(stack, SLEEP)
    processes = fake_ray(stack)
    members = Members(lambda: list(processes.values()))
    members.look()
    raylet = processes["/ray/raylet/raylet"]
    raylet.kill()
    raylet.wait()
    cause = guard_module._watch(root, members, lambda: None)
    assert cause == f"Ray's node manager (raylet), process {raylet.pid}"
    # At an ordinary stop the main process ends right after its parts.
    root.kill()
    root.wait()
    assert guard_module._watch(root, members, lambda: None) == ""


def test_the_guard_knows_the_process_tree_before_its_owner_dies(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_POLL_S", 0.01)
    root = start(stack, SLEEP)
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    scans: list[int] = []

    def scan() -> None:
        scans.append(1)
        if len(scans) == 3:
            os.close(writer)

    assert guard_module._watch(root, Members(list), scan, owner=reader) == ""
    assert len(scans) == 3


# As in a Ray cluster: `serve run` starts a raylet, the raylet a worker, which calls the function.
RAYLET = """
import os, subprocess, sys, time
code = "from deployments.serve.guard import guard_unguarded as guard; guard(); guard(); print(1)"
subprocess.run([os.environ["PYTHON"], "-c", code], check=True)
time.sleep(600)
"""
SERVE_RUN = """
import os, subprocess, sys, time
subprocess.Popen([sys.argv[2], "-c", sys.argv[3]])
time.sleep(600)
"""


@pytest.mark.parametrize("is_guarded", [False, True])
def test_an_unguarded_serve_run_gets_one_guard_from_within_its_cluster(
    stack: ExitStack, tmp_path: Path, is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raylet = tmp_path / "raylet"
    raylet.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[4]))
    script = tmp_path / "serve"
    script.write_text(SERVE_RUN)
    environment = {**os.environ, **({SERVER_ID: "1-ab"} if is_guarded else {})}
    root = psutil.Popen(
        [sys.executable, str(script), "run", str(raylet), RAYLET],
        env=environment,
        stdout=subprocess.PIPE,
    )
    stack.callback(_end, root)
    assert root.stdout is not None
    assert root.stdout.readline() == b"1\n"
    guards = [
        process
        for process in psutil.process_iter()
        if guard_module._has_words(process, ["-m", "deployments.serve.guard", str(root.pid)])
    ]
    assert len(guards) == (0 if is_guarded else 1)
    end_processes([*root.children(recursive=True), *guards], 0.0)


def test_a_guard_leaves_a_running_server_alone(stack: ExitStack) -> None:
    root = start(stack, SLEEP)
    guard = start_guard(root.pid, new_server_id(os.getpid()), owned=True)
    stack.callback(_end, guard)
    assert guard.stdin is not None
    with pytest.raises(subprocess.TimeoutExpired):
        guard.wait(1.5)
    assert is_alive(root)
    guard.stdin.close()
    guard.wait(LIMIT_S)


def test_the_guard_is_started_from_the_project(tmp_path: Path, stack: ExitStack) -> None:
    root = start(stack, SLEEP)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        guard = start_guard(root.pid, "1-a", owned=True)
    finally:
        os.chdir(before)
    stack.callback(_end, guard)
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(LIMIT_S) == 0


def test_a_helper_that_ends_is_started_again_with_growing_pauses(
    stack: ExitStack, tmp_path: Path
) -> None:
    now = [100.0]
    first = start(stack, SLEEP, "1-ab", "/dashboard/dashboard.py")
    shown = [psutil.Process(first.pid)]
    helpers = Helpers(lambda: shown, tmp_path / "log", lambda: now[0])
    stack.callback(helpers.close)
    helpers.look()
    now[0] += 1000
    assert helpers.restart() == []
    running: psutil.Process = first
    for pause_s in (0, 10, 20):
        running.kill()
        running.wait()
        if pause_s:
            now[0] += pause_s - 1
            assert helpers.restart() == []
            now[0] += 2
        assert helpers.restart() == ["Ray's dashboard"]
        (running,) = processes_of("1-ab")
        assert running.cmdline()[-1] == "/dashboard/dashboard.py"
        assert helpers.restart() == []


def test_a_process_with_the_id_of_a_former_owner_is_not_the_owner(stack: ExitStack) -> None:
    old = start(stack, SLEEP)
    young = start(stack, SLEEP)
    assert has_owner(young, f"{old.pid}-ab")
    assert not has_owner(old, f"{young.pid}-ab")
    old.kill()
    old.wait()
    assert not has_owner(young, f"{old.pid}-ab")
    assert not has_owner(young, "nonsense")
