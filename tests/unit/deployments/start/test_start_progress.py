"""When the launcher gives up a server that does not become ready: lack of progress, not time."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.settings import Settings
from core.units import MIB
from deployments.start import launcher, progress
from deployments.start.launcher import Launcher
from deployments.start.progress import Signs, StartProgress, signs_of
from deployments.start.readiness import Readiness

SILENT, UNREADY = Readiness.SILENT, Readiness.UNREADY
HOUR_S = 3600


def given_up_after(
    change: Callable[[float], Signs], *, step_s: float = 2.0, limit_s: float = 2 * HOUR_S
) -> tuple[float, str]:
    """Return when a start whose signs at each second are `change` is given up, and why."""
    now = [0.0]
    watch = StartProgress(lambda: now[0])
    while now[0] < limit_s:
        now[0] += step_s
        assert watch.is_due()
        if cause := watch.note(change(now[0])):
            return now[0], cause
    return 0.0, ""


def test_start_in_which_nothing_happens_is_given_up_after_three_minutes() -> None:
    after_s, cause = given_up_after(lambda _: Signs(SILENT, "Starting …", 100, {1: 2.0}))
    assert after_s == pytest.approx(182)
    assert cause == "The server has made no progress for 180 s."


@pytest.mark.parametrize(
    "change",
    [
        lambda now: Signs(log="\n".join(["started part " + "x" * int(now / 170)])),
        lambda now: Signs(memory_bytes=int(now / 170) * 8 * MIB),
        lambda now: Signs(cpu_s=dict.fromkeys(range(int(now / 170)), 1.0)),
    ],
    ids=["log", "memory", "processes"],
)
def test_slow_start_that_goes_on_is_waited_for(change: Callable[[float], Signs]) -> None:
    assert given_up_after(change) == (0.0, "")


def test_another_answer_of_the_server_is_progress() -> None:
    after_s, _ = given_up_after(lambda now: Signs(SILENT if now < 170 else UNREADY))
    assert after_s == pytest.approx(350, abs=2)


@pytest.mark.parametrize(
    "change",
    [
        # Ray Serve repeats its warning about a slow replica every 30 s.
        lambda now: Signs(log=f"pid={now:.0f} 2026-11-30 replica 8f3a{now:.0f} took {now} s\n"),
        lambda now: Signs(memory_bytes=MIB * int(now % 7)),
        # A part that crashes is started again and again.
        lambda now: Signs(cpu_s={int(now): 0.1, 1: 5.0}),
        lambda now: Signs(SILENT if now % 4 else UNREADY),
        # Ray's own processes use some processor time.
        lambda now: Signs(cpu_s={1: 0.05 * now, 2: 0.1 * now, 3: 0.19 * now}),
    ],
    ids=["repeated lines", "memory that varies", "restarts", "answers", "waiting processes"],
)
def test_what_only_repeats_is_no_progress(change: Callable[[float], Signs]) -> None:
    after_s, cause = given_up_after(change)
    assert 180 <= after_s <= 200
    assert "no progress" in cause


def test_process_that_computes_has_longer_but_not_for_ever() -> None:
    after_s, cause = given_up_after(lambda now: Signs(cpu_s={1: 0.0, 2: 0.3 * now}))
    assert after_s == pytest.approx(1202)
    assert cause == "The server computes, but nothing has changed for 1200 s."


def test_pause_of_this_process_is_not_taken_for_lack_of_progress() -> None:
    after_s, _ = given_up_after(lambda _: Signs(), step_s=HOUR_S, limit_s=15 * HOUR_S)
    assert after_s == 0


def test_endless_log_of_new_lines_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_MAX_KINDS", 10)
    after_s, _ = given_up_after(lambda now: Signs(log="x" * int(now)))
    assert 180 <= after_s <= 210


def test_looks_are_two_seconds_apart() -> None:
    now = [0.0]
    watch = StartProgress(lambda: now[0])
    assert not watch.is_due()
    now[0] = 2.0
    assert watch.is_due()
    watch.note(Signs())
    assert not watch.is_due()


def test_signs_of_real_processes_leave_out_those_that_ended() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    gone = psutil.Process(ended.pid)
    ended.wait()
    own = psutil.Process()
    signs = signs_of([gone, own], UNREADY, "line")
    assert set(signs.cpu_s) == {own.pid}
    assert signs.cpu_s[own.pid] > 0
    assert signs.memory_bytes > MIB
    assert (signs.answer, signs.log) == (UNREADY, "line")


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """A launcher whose server sleeps; looks are not spaced, and a hundred of them are an hour."""
    times = iter(range(0, 10**6, 36))
    monkeypatch.setattr(launcher, "StartProgress", lambda: StartProgress(lambda: next(times)))
    monkeypatch.setattr(launcher, "_POLL_S", 0.0)
    monkeypatch.setattr(launcher, "ask_readiness", lambda _: SILENT)
    started = Launcher(tmp_path / "config.yaml", Settings(home=tmp_path))
    child: Any = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started._child = child
    yield started
    child.kill()
    child.wait()


def test_launcher_gives_up_and_says_why(
    waiting: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not waiting._wait_until_ready()
    said = capsys.readouterr().out
    assert said.startswith("The server has made no progress for ")
    assert "Full log: " in said


def test_launcher_waits_as_long_as_there_is_progress(
    waiting: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [0]

    def grow(answer: Readiness) -> Signs:
        looks[0] += 1
        return replace(Signs(answer), memory_bytes=looks[0] * 8 * MIB)

    monkeypatch.setattr(waiting, "_signs", grow)
    monkeypatch.setattr(
        launcher, "ask_readiness", lambda _: Readiness.READY if looks[0] > 300 else SILENT
    )
    assert waiting._wait_until_ready()
