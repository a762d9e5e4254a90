"""Notices of failures of Apple's GPU driver, from reports as macOS writes them."""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from core.gpu_failures import gpu_failures, is_gpu_panic

STARTED = 1_790_000_000.0
KEXTS = "last started kext: com.apple.iokit.IOGPUFamily 130.13"


def panic_text(cause: str) -> str:
    """Return a report: a line about the file, then the report itself, both JSON."""
    head = {"bug_type": "210", "os_version": "macOS 26.4.1 (25E258)"}
    body = {"panicString": f"panic(cpu 7 caller 0xfffffe0051a16ea8): {cause}\n{KEXTS}"}
    return f"{json.dumps(head)}\n{json.dumps(body)}"


GPU = panic_text('"completeMemory() prepare count underflow" @IOGPUMemory.cpp:550')
GROUP = panic_text('"remove_memory_object() memory object not found" @IOGPUGroupMemory.cpp:323')
OTHER = panic_text('"userspace watchdog timeout: no successful checkins from WindowServer"')


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of reports of a Mac."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "boot_time", lambda: STARTED)
    folder = tmp_path / "Library" / "Logs" / "DiagnosticReports"
    folder.mkdir(parents=True)
    return folder


def write(folder: Path, name: str, text: str, after_s: float) -> None:
    (folder / name).write_text(text)
    os.utime(folder / name, (STARTED + after_s, STARTED + after_s))


@pytest.mark.parametrize("text", [GPU, GROUP])
def test_a_panic_of_the_gpus_driver_is_told_after_the_restart(
    text: str, reports: Path, tmp_path: Path
) -> None:
    write(reports, "panic-full-2026-09-21-101010.0002.panic", text, 30)
    write(reports, "panic-full-2026-09-21-090000.0001.panic", text, 20)
    (notice,) = gpu_failures(tmp_path)
    assert "panic-full-2026-09-21-101010.0002.panic" in notice
    assert "IMPETUS_MEMORY_BUDGET" in notice


def test_what_another_part_caused_or_an_earlier_start_is_not_told(
    reports: Path, tmp_path: Path
) -> None:
    write(reports, "panic-full-2026-09-21-101010.0002.panic", OTHER, 30)
    write(reports, "panic-full-2026-09-20-101010.0002.panic", GPU, -30)
    write(reports, "gpuEvent-WindowServer-2026-09-21-111111.ips", "{}", 60)
    write(reports, "gpuEvent-python3.12-2026-09-20-111111.ips", "{}", -60)
    assert gpu_failures(tmp_path) == []


def test_a_restart_of_the_gpu_by_python_is_told(reports: Path, tmp_path: Path) -> None:
    write(reports, "gpuEvent-python3.12-2026-09-21-111111.ips", "{}", 60)
    (notice,) = gpu_failures(tmp_path)
    assert "gpuEvent-python3.12-2026-09-21-111111.ips" in notice
    assert "IMPETUS_PREFILL_CHUNK_TOKENS" in notice


def test_reports_that_cannot_be_read_stop_nothing(reports: Path, tmp_path: Path) -> None:
    (reports / "panic-full-2026-09-21-101010.0002.panic").mkdir()
    os.utime(reports / "panic-full-2026-09-21-101010.0002.panic", (STARTED + 1, STARTED + 1))
    (reports / "gone.panic").symlink_to(tmp_path / "nowhere")
    assert gpu_failures(tmp_path) == []
    assert gpu_failures(tmp_path / "absent") == []
    assert not is_gpu_panic(reports / "gone.panic")


def test_other_systems_have_none(
    reports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(reports, "panic-full-2026-09-21-101010.0002.panic", GPU, 30)
    monkeypatch.setattr(sys, "platform", "linux")
    assert gpu_failures(tmp_path) == []


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="these reports are on macOS only")
def test_this_macs_reports_can_be_looked_through() -> None:
    assert all("scripts/doctor" in notice for notice in gpu_failures())
