"""Tests that the machine is kept awake only while there is work."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.settings import Settings
from core.supervision import Supervisor
from deployments.serve.awake import LINGER_S, AwakeKeeper, Caffeinate, keep_awake
from tests.waiting import wait_until


class Blocker:
    """Records what is asked of it."""

    def __init__(self) -> None:
        self.is_held = False
        self.calls: list[str] = []

    def hold(self) -> None:
        self.calls.append("hold")
        self.is_held = True

    def release(self) -> None:
        self.calls.append("release")
        self.is_held = False


class Work:
    """Requests, a battery and a clock."""

    def __init__(self) -> None:
        self.count = 0
        self.charge: float | Exception | None = None
        self.charge_reads = 0
        self.now = 0.0
        self.blocker = Blocker()
        self.keeper = AwakeKeeper(
            lambda: self.count > 0, self.blocker, self.read_charge, lambda: self.now
        )

    def read_charge(self) -> float | None:
        self.charge_reads += 1
        if isinstance(self.charge, Exception):
            raise self.charge
        return self.charge

    async def at(self, now: float, count: int) -> bool:
        """Return whether the machine is kept awake at this time with so many requests."""
        self.now, self.count = now, count
        await self.keeper.look()
        return self.blocker.is_held


async def test_an_idle_server_never_keeps_the_machine_awake() -> None:
    work = Work()
    assert not await work.at(0, 0)
    assert not await work.at(1000, 0)
    assert work.blocker.calls == []
    assert work.charge_reads == 0


async def test_work_keeps_it_awake_and_a_minute_longer() -> None:
    work = Work()
    assert await work.at(0, 1)
    assert await work.at(3600, 2)
    assert await work.at(3600 + LINGER_S - 1, 0)
    assert not await work.at(3600 + LINGER_S + 1, 0)
    assert work.blocker.calls == ["hold", "release"]
    assert await work.at(9000, 1)


async def test_a_low_battery_lets_it_sleep() -> None:
    work = Work()
    work.charge = 0.5
    assert await work.at(0, 1)
    work.charge = 0.2
    assert await work.at(30, 1)
    assert not await work.at(61, 1)
    work.charge = None
    assert await work.at(122, 1)
    assert work.charge_reads == 3


@pytest.mark.parametrize(
    "problem", [OSError("no pmset"), ValueError("nonsense"), subprocess.TimeoutExpired("pmset", 2)]
)
async def test_an_unknown_battery_counts_as_mains_power(problem: Exception) -> None:
    work = Work()
    work.charge = problem
    assert await work.at(0, 1)


async def test_a_blocker_that_ended_is_started_again() -> None:
    work = Work()
    assert await work.at(0, 1)
    work.blocker.is_held = False
    assert await work.at(5, 1)
    assert work.blocker.calls == ["hold", "hold"]


async def test_the_end_of_the_process_part_releases() -> None:
    work = Work()
    work.count = 1
    task = asyncio.ensure_future(work.keeper.run())
    await wait_until(lambda: work.blocker.is_held, "the blocker is held")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert work.blocker.calls == ["hold", "release"]


async def test_caffeinate_runs_once_ends_and_leaves_no_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    blocker = Caffeinate(["/bin/sh", "-c", f'echo "$0 $$" >>"{log}"; exec sleep 60'])
    blocker.release()
    blocker.hold()
    assert blocker.is_held
    process = blocker._process
    assert process is not None
    await wait_until(lambda: log.is_file() and log.read_text(), "the process runs")
    blocker.hold()
    assert blocker._process is process
    blocker.release()
    assert process.returncode is not None
    assert not blocker.is_held
    assert log.read_text().count("\n") == 1


def test_caffeinate_is_told_which_process_to_follow() -> None:
    blocker = Caffeinate()
    assert list(blocker._command) == ["/usr/bin/caffeinate", "-i", "-w"]
    echo = Caffeinate(["/bin/sh", "-c", f'[ "$0" = {os.getpid()} ]'])
    echo.hold()
    assert echo._process is not None
    assert echo._process.wait() == 0


@pytest.mark.parametrize(
    ("system", "setting", "parts"),
    [
        ("darwin", "auto", ["sleep blocker"]),
        ("darwin", "never", []),
        ("linux", "auto", []),
    ],
)
async def test_only_a_mac_has_the_part_and_never_switches_it_off(
    monkeypatch: pytest.MonkeyPatch, system: str, setting: str, parts: list[str]
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setenv("IMPETUS_KEEP_AWAKE", setting)
    supervisor = Supervisor()
    keep_awake(supervisor, Settings(), lambda: False)
    assert [one.name for one in supervisor.parts()] == parts
    await supervisor.stop()


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs caffeinate and pmset of macOS")
def test_macos_lists_the_assertion_while_it_is_held() -> None:
    blocker = Caffeinate()
    blocker.hold()
    process = blocker._process
    assert process is not None
    try:
        found = subprocess.run(
            ["/usr/bin/pmset", "-g", "assertions"], capture_output=True, text=True, check=True
        ).stdout
        assert f"pid {process.pid}(caffeinate)" in found
        assert "PreventUserIdleSystemSleep" in found
    finally:
        blocker.release()
