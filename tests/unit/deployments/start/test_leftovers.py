"""What a killed server leaves behind, and what belongs to others."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.child import SERVER_ID
from deployments.serve.processes import end_processes, new_server_id
from deployments.start.leftovers import end_former_servers, remove_former_folders


@pytest.fixture
def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A folder for temporary folders, with a path short enough for sockets."""
    path = Path("/tmp") / f"leftovers-{os.getpid()}"
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


def session(tmp: Path, second: int, pid: int, log: str = "replica_impetus_router_a.log") -> Path:
    folder = tmp / "ray" / f"session_2026-01-01_00-00-{second:02}_123456_{pid}"
    (folder / "logs" / "serve").mkdir(parents=True)
    (folder / "logs" / "serve" / log).write_text("x")
    return folder


def socket_folder(tmp: Path, name: str, *, listens: bool, age_s: float = 3600) -> Path:
    folder = tmp / name
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "events"))
        if listens:
            server.listen()
            listener = server.dup()
            sockets.append(listener)
    moment = folder.stat().st_mtime - age_s
    os.utime(folder, (moment, moment))
    return folder


sockets: list[socket.socket] = []


@pytest.fixture(autouse=True)
def closed_sockets() -> Iterator[None]:
    yield
    while sockets:
        sockets.pop().close()


def test_only_ended_sessions_of_this_project_are_removed_and_the_last_is_kept(
    tmp: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    removed = [session(tmp, 1, dead_pid), session(tmp, 2, dead_pid)]
    kept = [
        session(tmp, 3, dead_pid),
        session(tmp, 4, os.getpid()),
        session(tmp, 5, dead_pid, "replica_other_app.log"),
    ]
    (tmp / "ray" / "session_latest").symlink_to(kept[1])
    (tmp / "ray" / "session_2020-01-01_00-00-00_1_1").symlink_to(kept[0])
    remove_former_folders(tmp)
    assert [path.exists() for path in removed] == [False, False]
    assert [path.exists() for path in kept] == [True, True, True]


@pytest.mark.parametrize("listens", [True, False])
def test_the_session_of_a_living_cluster_is_kept_although_its_starter_has_ended(
    tmp: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    first = session(tmp, 1, dead_pid)
    (first / "sockets").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(first / "sockets" / "raylet"))
        if listens:
            server.listen()
            sockets.append(server.dup())
    session(tmp, 2, dead_pid)
    remove_former_folders(tmp)
    assert first.exists() == listens


def test_socket_folders_without_a_listener_are_removed(tmp: Path) -> None:
    dead = socket_folder(tmp, "impetus-dead", listens=False)
    kept = [
        socket_folder(tmp, "impetus-live", listens=True),
        socket_folder(tmp, "impetus-new", listens=False, age_s=1),
        socket_folder(tmp, "another", listens=False),
        tmp / "impetus-mlx-fresh",
    ]
    kept[-1].mkdir()
    old = tmp / "impetus-mlx-old"
    old.mkdir()
    os.utime(old, (1, 1))
    remove_former_folders(tmp)
    assert [dead.exists(), old.exists()] == [False, False]
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("content", ["README.md", "events"])
def test_a_folder_of_the_users_own_is_kept_however_old(tmp: Path, content: str) -> None:
    own, empty = tmp / "impetus-worktree", tmp / "impetus-empty"
    own.mkdir()
    empty.mkdir()
    (own / content).write_text("x")
    for folder in (own, empty):
        os.utime(folder, (1, 1))
    remove_former_folders(tmp)
    assert (own / content).exists()
    assert not empty.exists()


def test_a_link_to_another_folder_is_not_followed(tmp: Path) -> None:
    target = tmp / "precious"
    target.mkdir()
    os.utime(target, (1, 1))
    (tmp / "impetus-link").symlink_to(target)
    remove_former_folders(tmp)
    assert target.exists()


def test_processes_of_a_server_without_an_owner_are_ended(dead_pid: int) -> None:
    def start(owner: int) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"],
            env={**os.environ, SERVER_ID: new_server_id(owner)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        return process

    orphan, live = start(dead_pid), start(os.getpid())
    try:
        end_former_servers()
        assert orphan.wait(30) != 0
        assert live.poll() is None
    finally:
        for process in (orphan, live):
            process.kill()
            process.wait()


def test_a_replica_that_lost_its_raylet_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.start.leftovers._STRAGGLER_S", 0.0)
    name = "ray::ServeReplica:impetus:router"
    command = "exec -a %s sleep 600"
    orphan = subprocess.Popen(["bash", "-c", command % name])
    other = subprocess.Popen(["bash", "-c", command % "ray::ServeReplica:other:router"])
    # As under a raylet: the parent is a process of that name.
    raylet = tmp_path / "raylet"
    raylet.symlink_to(sys.executable)
    code = (
        "import subprocess, sys, time; subprocess.Popen(['bash', '-c', sys.argv[1]]);"
        "print(1, flush=True); time.sleep(600)"
    )
    owner = psutil.Popen(
        [str(raylet), "-c", code, command % name], stdout=subprocess.PIPE, start_new_session=True
    )
    assert owner.stdout is not None
    owner.stdout.readline()
    try:
        wait_until(lambda: is_named(orphan.pid, name))
        wait_until(lambda: any(is_named(child.pid, name) for child in owner.children()))
        end_former_servers()
        assert orphan.poll() is None
        end_former_servers(are_stragglers=True)
        assert orphan.wait(30) != 0
        assert other.poll() is None
        assert len(owner.children()) == 1
    finally:
        end_processes([*owner.children(), owner], 0.0)
        for process in (orphan, other):
            process.kill()
            process.wait()
        owner.wait()
        owner.stdout.close()


def is_named(pid: int, name: str) -> bool:
    return psutil.Process(pid).cmdline()[:1] == [name]


def wait_until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
