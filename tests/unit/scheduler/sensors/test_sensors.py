"""Memory as the operating system tells it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from core.units import GIB
from scheduler.sensors import macos_memory
from scheduler.sensors.machine import machine_memory_bytes, memory_budget_bytes
from scheduler.sensors.macos_memory import MacLimits, parse_wired_limit
from tests.fake_library import compile_library


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


@pytest.mark.parametrize(
    ("total_gib", "gpu_gib", "budget_gib"),
    [
        # Metal's recommendation on Macs of each size, and a wired limit above the memory.
        (8, 5.33, 4.0),
        (16, 10.67, 9.07),
        (24, 16.0, 13.6),
        (36, 27.0, 22.95),
        (64, 48.0, 40.8),
        (128, 96.0, 81.6),
        (64, 100.0, 48.0),
        # Unknown: less than what any Mac recommends.
        (16, None, 8.84),
        (64, None, 35.36),
    ],
)
def test_the_budget_of_a_mac_is_a_share_of_the_gpus_and_leaves_a_reserve(
    total_gib: int, gpu_gib: float | None, budget_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    gpu = None if gpu_gib is None else int(gpu_gib * GIB)
    assert memory_budget_bytes(total_gib * GIB, gpu) / GIB == pytest.approx(budget_gib, abs=0.01)


SYSCTL = """
#include <string.h>
int sysctlbyname(const char *name, void *old, size_t *size, void *new, size_t length) {
    unsigned long memory = 17179869184;
    unsigned int wired = 12288;
    int is_memory = !strcmp(name, "hw.memsize");
    if (!is_memory && strcmp(name, "iogpu.wired_limit_mb")) return -1;
    *size = is_memory ? 8 : 4;
    memcpy(old, is_memory ? (void *)&memory : (void *)&wired, *size);
    return 0;
}
"""


def test_a_mac_tells_its_memory_and_limit_without_psutil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("host_statistics64(HOST_VM_INFO64) syscall failed")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    library = compile_library(tmp_path / "libSystem.so", SYSCTL)
    monkeypatch.setattr(macos_memory, "_LIBRARY", str(library))
    assert machine_memory_bytes() == 16 * GIB
    assert MacLimits(lambda: 10 * GIB).gpu_bytes() == 12 * GIB


def test_a_mac_that_tells_nothing_is_asked_through_psutil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(macos_memory, "_LIBRARY", str(tmp_path / "absent.so"))
    assert machine_memory_bytes() == psutil.virtual_memory().total


METAL = """
#include <stdlib.h>
long device = 1, list = 2, calls = 0;
void *MTLCreateSystemDefaultDevice(void) { calls++; return getenv("FAKE_GRAPHICS") ? &device : 0; }
void *MTLCopyAllDevices(void) { return %s; }
long count(void) { return calls; }
"""
OBJC = """
#include <stdlib.h>
#include <string.h>
void *sel_registerName(const char *name) { return strdup(name); }
unsigned long objc_msgSend(long *receiver, const char *selector) {
    if (*receiver == 2 && !strcmp(selector, "firstObject")) *receiver = 1, selector = 0;
    if (!selector) return (unsigned long)receiver;
    if (*receiver == 1 && !strcmp(selector, "recommendedMaxWorkingSetSize")) return 11453251584;
    abort();
}
"""
# Loading it gives the process a connection to the window server, and so a default device.
GRAPHICS = """
#include <stdlib.h>
__attribute__((constructor)) static void begin(void) { setenv("FAKE_GRAPHICS", "1", 1); }
"""


@pytest.mark.parametrize(
    ("graphics", "devices", "found"),
    [
        (GRAPHICS, "0", 11453251584),
        # Without the window server Metal still lists its devices.
        ("int nothing;", "&list", 11453251584),
        ("", "&list", 11453251584),
        ("", "0", 0),
    ],
)
def test_metal_is_asked_with_core_graphics_then_for_all_devices(
    graphics: str, devices: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.unsetenv("FAKE_GRAPHICS")
    paths = [tmp_path / name for name in ("graphics.so", "metal.so", "objc.so")]
    if graphics:
        compile_library(paths[0], graphics)
    compile_library(paths[1], METAL % devices)
    compile_library(paths[2], OBJC)
    for name, path in zip(("_CORE_GRAPHICS", "_METAL", "_OBJC"), paths, strict=True):
        monkeypatch.setattr(macos_memory, name, str(path))
    macos_memory._metal_working_set_bytes.cache_clear()
    limits = MacLimits(wired_limit=lambda: bytes(4))
    assert [limits.gpu_bytes() for _ in range(2)] == [found or None] * 2
    # Metal opens the GPU, so one process asks it once.
    assert ctypes.CDLL(str(paths[1])).count() == 1
    macos_memory._metal_working_set_bytes.cache_clear()
    os.unsetenv("FAKE_GRAPHICS")


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Metal is on macOS only")
def test_this_macs_metal_answers() -> None:
    code = "from scheduler.sensors.macos_memory import MacLimits; print(MacLimits().gpu_bytes())"
    # In a process that loaded nothing else, as the scheduler's.
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert GIB < int(asked.stdout) <= psutil.virtual_memory().total
