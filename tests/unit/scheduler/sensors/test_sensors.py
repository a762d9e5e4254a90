"""Memory as the operating system tells it."""

from pathlib import Path

import psutil
import pytest

from core.units import GIB
from scheduler.sensors.machine import machine_memory_bytes, memory_budget_bytes
from scheduler.sensors.macos_memory import MacLimits, parse_wired_limit


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


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ((0).to_bytes(4, "little"), None),
        ((24_576).to_bytes(4, "little"), 24 * GIB),
        ((8192).to_bytes(8, "little"), 8 * GIB),
    ],
)
def test_the_wired_limit_is_mebibytes_and_0_is_none(value: bytes, limit: int | None) -> None:
    assert parse_wired_limit(value) == limit


@pytest.mark.parametrize("value", [b"", b"12", (-1).to_bytes(4, "little", signed=True)])
def test_what_is_no_wired_limit_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="iogpu"):
        parse_wired_limit(value)


def test_a_macs_limits_are_the_users_then_metals_then_unknown() -> None:
    def missing() -> bytes:
        raise OSError("unknown oid")

    unset, set_ = bytes(4), (8192).to_bytes(4, "little")
    assert MacLimits(lambda: 12 * GIB, lambda: set_).gpu_bytes() == 8 * GIB
    assert MacLimits(lambda: 12 * GIB, lambda: unset).gpu_bytes() == 12 * GIB
    assert MacLimits(lambda: 12 * GIB, missing).gpu_bytes() == 12 * GIB
    assert MacLimits(lambda: 0, missing).gpu_bytes() is None


@pytest.mark.parametrize(("gpu", "budget"), [(12 * GIB, 12 * GIB), (64 * GIB, 14 * GIB)])
def test_the_budget_of_a_mac_is_the_gpus_and_leaves_the_margin(gpu: int, budget: int) -> None:
    assert memory_budget_bytes(16 * GIB, gpu) == budget
