"""Thread names and core counts as the operating system tells them."""

import os
import sys
import threading
from pathlib import Path

import pytest

from backends.engine.threads import name_this_thread, performance_cores


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thread_gets_its_name_cut_to_what_the_system_keeps() -> None:
    seen: list[str] = []

    def work() -> None:
        name_this_thread("impetus-engine-and-more")
        task = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        seen.append(task.read_text().strip())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["impetus-engine-"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_performance_cores_are_within_what_the_process_may_use() -> None:
    assert 1 <= performance_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="asks sysctl of Apple Silicon")
def test_performance_cores_are_the_fast_cluster_on_a_mac() -> None:
    assert 1 <= performance_cores() <= (os.cpu_count() or 1)
