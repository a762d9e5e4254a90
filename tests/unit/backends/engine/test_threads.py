"""Thread names and core counts as the operating system tells them."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backends.engine.preparation import PreparationThreads
from backends.engine.threads import name_this_thread, performance_cores
from backends.watch import StepWatch


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("believed", ["linux", "darwin"])
def test_a_thread_gets_its_name_cut_to_what_the_system_keeps(
    believed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system's own function, also while a test lets code believe in another system."""
    monkeypatch.setattr("sys.platform", believed)
    seen: list[str] = []

    def work() -> None:
        name_this_thread("impetus-engine-and-more")
        task = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        seen.append(task.read_text().strip())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["impetus-engine-"]


def test_naming_a_thread_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        started.append(arguments)
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    name_this_thread(threading.current_thread().name)
    assert not started


def test_naming_a_thread_never_raises() -> None:
    name_this_thread("\ud800")


def test_work_is_done_on_a_thread_that_cannot_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    threads = PreparationThreads(StepWatch())
    try:
        assert threads.submit(lambda: 7).done.result(60) == 7
    finally:
        threads.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_performance_cores_are_within_what_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)  # type: ignore[attr-defined,unused-ignore]
    assert 1 <= performance_cores() <= len(allowed)


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="asks sysctl of Apple Silicon")
def test_performance_cores_are_the_fast_cluster_on_a_mac() -> None:
    assert 1 <= performance_cores() <= (os.cpu_count() or 1)
