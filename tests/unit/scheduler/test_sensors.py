"""Memory as the operating system tells it."""

from pathlib import Path

import psutil
import pytest

from core.units import GIB
from scheduler.sensors import machine_memory_bytes, memory_budget_bytes


@pytest.fixture
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")


@pytest.mark.usefixtures("on_linux")
def test_machine_memory_obeys_a_smaller_cgroup_limit(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1073741824\n")
    assert machine_memory_bytes((tmp_path / "absent", limit)) == GIB


@pytest.mark.usefixtures("on_linux")
@pytest.mark.parametrize("text", ["max", "9223372036854771712"])
def test_machine_memory_without_a_limit_is_the_ram(tmp_path: Path, text: str) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(text)
    assert machine_memory_bytes((limit,)) == psutil.virtual_memory().total


@pytest.mark.parametrize("total", [GIB, 4 * GIB, 16 * GIB, 192 * GIB])
def test_memory_budget_leaves_room_for_the_system(total: int) -> None:
    budget = memory_budget_bytes(total)
    assert total // 4 <= budget < total
