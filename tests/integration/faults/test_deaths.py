"""The death of each part: the server ends with a sentence and leaves nothing, or goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deployments.serve.processes import is_alive
from tests.integration.server import ROOT, Server, wait_until

ECHO = {"FORMATS": "echo", "STARTERS": "0"}
# What the server may take to end as a whole, and a hanging test does not.
LIMIT_S = 30.0


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def part(server: Server, *marks: str) -> psutil.Process:
    """Return the process of the server whose command line contains one of `marks`."""
    return next(
        process
        for process in server.tree
        if any(mark in command_of(process).partition(" --")[0] for mark in marks)
    )


def kill_and_wait(server: Server, victim: psutil.Process) -> float:
    """Kill; return the seconds until no process of the server was left."""
    process = server.process
    assert process is not None
    started = time.monotonic()
    victim.kill()

    def is_gone() -> bool:
        return process.poll() is not None and not any(map(is_alive, server.tree))

    wait_until(is_gone, "every process has ended", LIMIT_S)
    return time.monotonic() - started


def wait_for_banner(server: Server) -> None:
    """Return when the launcher has printed its last line; it notices readiness after /readyz."""
    assert server.process is not None
    assert server.process.stdout is not None
    for line in server.process.stdout:
        if line.startswith("Ctrl-C stops"):
            return
    raise AssertionError("the launcher ended without its banner")


def output(server: Server) -> str:
    assert server.process is not None
    assert server.process.stdout is not None
    return server.process.stdout.read()


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    return lambda name, seconds: record_property(name, round(seconds, 1))


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        (("raylet/raylet",), "raylet"),
        (("gcs/gcs_server",), "gcs_server"),
        (("ray::DashboardAgent", "dashboard/agent.py"), "dashboard agent"),
    ],
)
def test_the_server_ends_with_a_sentence_when_a_part_dies_that_nobody_restarts(
    other_server: Server, marks: tuple[str, ...], name: str, measured: Callable[[str, float], None]
) -> None:
    other_server.start(**ECHO)
    wait_for_banner(other_server)
    measured(name, kill_and_wait(other_server, part(other_server, *marks)))
    assert other_server.process is not None
    assert other_server.process.wait(LIMIT_S) == 1
    text = output(other_server)
    assert name in text
    assert "ended, and the server cannot continue without it" in text


def test_nothing_is_left_of_a_killed_launcher_and_the_next_start_works_at_once(
    other_server: Server, measured: Callable[[str, float], None]
) -> None:
    other_server.start(**ECHO)
    assert other_server.process is not None
    tree = list(other_server.tree)
    other_server.process.kill()
    other_server.process.wait()
    # On the same port, without waiting for the first one's end.
    started = time.monotonic()
    other_server.start(**ECHO)
    # Until now the first one may have answered.
    wait_until(lambda: not any(map(is_alive, tree)), "the first server has ended", LIMIT_S)
    other_server.wait_until_ready()
    measured("next start", time.monotonic() - started)
    other_server.tree = psutil.Process(other_server.process.pid).children(recursive=True)
    # Now the launcher is killed while it is stopped, so that it cannot notice anything.
    launcher = psutil.Process(other_server.process.pid)
    launcher.suspend()
    measured("launcher", kill_and_wait(other_server, launcher))


def by_hand(server: Server, monkeypatch: pytest.MonkeyPatch, *, prefix: str = "") -> None:
    """Start as README.md says: with Ray's settings from scripts/env."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    serve = Path(sys.executable).with_name("serve")
    script = f"set -a; . scripts/env; set +a; {prefix} exec '{serve}' run serve_config.yaml"
    server.start("/bin/sh", "-c", script, **ECHO)


@pytest.mark.parametrize("victim", ["serve run", "raylet/raylet"])
def test_nothing_is_left_of_a_serve_run_by_hand(
    other_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    measured: Callable[[str, float], None],
) -> None:
    by_hand(other_server, monkeypatch)
    assert other_server.process is not None
    root = psutil.Process(other_server.process.pid)
    target = root if victim == "serve run" else part(other_server, victim)
    measured(victim, kill_and_wait(other_server, target))
    assert other_server.process.wait(LIMIT_S) != 0
    if target is not root:
        assert "impetus: Ray's node manager (raylet)" in output(other_server)


def test_a_serve_run_by_hand_can_be_interrupted_although_its_shell_ignores_that(
    other_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(other_server, monkeypatch, prefix="trap '' INT;")
    assert other_server.stop(signal.SIGINT) == 0
    assert other_server.survivors() == []


def test_the_server_is_stopped_when_nobody_reads_its_output(other_server: Server) -> None:
    # As `scripts/serve | head -1`: the pipe is closed before the server is ready.
    environment = {
        **os.environ,
        "IMPETUS_HOME": str(other_server.home),
        "IMPETUS_PORT": str(other_server.port),
        **{f"IMPETUS_{name}": value for name, value in ECHO.items()},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.start.launcher"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert b"Starting" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 1
        marked = f"IMPETUS_HOME={other_server.home}"
        assert [one for one in psutil.process_iter() if marked in environment_of(one)] == []
    finally:
        process.kill()
        process.wait()


def environment_of(process: psutil.Process) -> list[str]:
    try:
        return [f"{name}={value}" for name, value in process.environ().items()]
    except (psutil.Error, OSError):
        return []
