"""Numbers of macOS' headers that the code uses, as they were read there, and on a Mac the headers.

Read in xnu 11417.101.15 and Libnotify (macOS 15.4); the names are public interfaces.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from core import machine, process_memory, stack
from deployments import stderr_tail
from deployments.start import environment
from scheduler.sensors import macos, macos_pages
from scheduler.thermal import ThermalState
from tests.fake_library import compile_library
from tests.fake_mac import process

RECORDED = {
    "RUSAGE_INFO_V2": 2,
    "sizeof(struct rusage_info_v2)": 160,
    "offsetof(struct rusage_info_v2, ri_phys_footprint)": 72,
    "F_GETPATH": 50,
    "F_FULLFSYNC": 51,
    "MAXPATHLEN": 1024,
    "sizeof(((struct sockaddr_un *)0)->sun_path)": 104,
    "QOS_CLASS_UTILITY": 17,
    "HOST_VM_INFO64": 4,
    "offsetof(struct vm_statistics64, inactive_count)": 8,
    "offsetof(struct vm_statistics64, wire_count)": 12,
    "NOTIFY_STATUS_OK": 0,
    "DISPATCH_MEMORYPRESSURE_NORMAL": 1,
    "DISPATCH_MEMORYPRESSURE_WARN": 2,
    "DISPATCH_MEMORYPRESSURE_CRITICAL": 4,
    "kOSThermalPressureLevelNominal": 0,
    "kOSThermalPressureLevelModerate": 1,
    "kOSThermalPressureLevelHeavy": 2,
    "kOSThermalPressureLevelTrapping": 3,
    "kOSThermalPressureLevelSleeping": 4,
    "sizeof(struct timespec)": 16,
    "sizeof(uuid_t)": 16,
}
HEADERS = (
    *("dispatch/dispatch.h", "fcntl.h", "libkern/OSThermalNotification.h", "libproc.h"),
    *(
        "mach/mach.h",
        "notify.h",
        "stddef.h",
        "stdio.h",
        "sys/param.h",
        "sys/qos.h",
        "sys/resource.h",
    ),
    *("sys/un.h", "time.h", "uuid/uuid.h"),
)


def test_the_code_has_the_recorded_numbers() -> None:
    footprint = "offsetof(struct rusage_info_v2, ri_phys_footprint)"
    assert RECORDED["RUSAGE_INFO_V2"] == process_memory._RUSAGE_INFO_V2
    assert RECORDED["sizeof(struct rusage_info_v2)"] == process_memory._RUSAGE_BYTES
    assert RECORDED[footprint] == process_memory._FOOTPRINT_OFFSET
    assert RECORDED["F_GETPATH"] == stderr_tail._F_GETPATH == process.F_GETPATH
    assert RECORDED["F_FULLFSYNC"] == process.F_FULLFSYNC
    assert RECORDED["MAXPATHLEN"] == stderr_tail._MAX_PATH
    assert RECORDED["QOS_CLASS_UTILITY"] == stack._QOS_CLASS_UTILITY
    assert RECORDED["HOST_VM_INFO64"] == macos_pages._HOST_VM_INFO64
    # The counts are the first numbers of 32 bits.
    last = RECORDED["offsetof(struct vm_statistics64, wire_count)"]
    assert last == 4 * (macos_pages._PAGE_COUNTS - 1)
    # One byte is the final zero.
    path_bytes = RECORDED["sizeof(((struct sockaddr_un *)0)->sun_path)"]
    assert path_bytes == environment._SOCKET_BYTES["darwin"] + 1


def test_levels_have_the_meaning_that_apple_gives_them() -> None:
    """Apple's ProcessInfo calls moderate fair, heavy serious, trapping and sleeping critical."""
    named = ("Nominal", "Moderate", "Heavy", "Trapping", "Sleeping")
    states = [macos._THERMAL_STATES[RECORDED[f"kOSThermalPressureLevel{name}"]] for name in named]
    assert states == [
        ThermalState.NOMINAL,
        ThermalState.FAIR,
        ThermalState.SERIOUS,
        ThermalState.CRITICAL,
        ThermalState.CRITICAL,
    ]
    assert len(macos._THERMAL_STATES) == len(named)
    pressures = {RECORDED[f"DISPATCH_MEMORYPRESSURE_{name}"] for name in ("NORMAL", "WARN")}
    assert set(macos._PRESSURE_STATES) == {*pressures, RECORDED["DISPATCH_MEMORYPRESSURE_CRITICAL"]}


LAYOUT = """
#include <stddef.h>
#include <stdint.h>
struct usage { uint8_t id[16]; uint64_t before[7], footprint, after[10]; };
struct wait { int64_t seconds, nanoseconds; };
long size(void) { return sizeof(struct usage); }
long footprint(void) { return offsetof(struct usage, footprint); }
long wait_size(void) { return sizeof(struct wait); }
"""


def test_a_c_compiler_lays_the_numbers_out_in_the_same_way(tmp_path: Path) -> None:
    import ctypes

    library = ctypes.CDLL(str(compile_library(tmp_path / "layout.so", LAYOUT)))
    assert library.size() == process_memory._RUSAGE_BYTES
    assert library.footprint() == process_memory._FOOTPRINT_OFFSET
    assert library.wait_size() == RECORDED["sizeof(struct timespec)"]


def test_every_release_of_macos_that_runs_the_server_has_its_kernel() -> None:
    assert {darwin: machine.macos_release_of(darwin) for darwin in ("23.0", "24.0", "25.0")} == {
        "23.0": 14,
        "24.0": 15,
        "25.0": 26,
    }


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="the headers are in macOS' SDK")
def test_the_headers_of_this_mac_have_the_recorded_numbers(tmp_path: Path) -> None:
    lines = [f"#include <{name}>" for name in HEADERS]
    printed = [f'printf("%ld\\n", (long)({name}));' for name in RECORDED]
    source, program = tmp_path / "numbers.c", tmp_path / "numbers"
    source.write_text("\n".join((*lines, "int main(void) {", *printed, "return 0; }")))
    subprocess.run(["cc", "-w", "-o", str(program), str(source)], check=True)
    told = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert dict(zip(RECORDED, map(int, told.split()), strict=True)) == RECORDED
