"""What other applications leave on a Mac, by real calls into a stand-in of macOS' library."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from core.units import GIB
from scheduler.sensors import macos_pages
from scheduler.sensors.macos import MacSensor
from scheduler.thermal import ThermalState
from tests.fake_library import compile_library

# Its arguments are checked as the kernel does; the counts are those of a Mac of 16 GB in use.
STATISTICS = """
#include <stdint.h>
#include <string.h>
static int ports;
unsigned mach_host_self(void) { ports++; return 0x80000003u; }
int references(void) { return ports; }
int host_page_size(unsigned host, size_t *size) {
    if (host != 0x80000003u) return 4;
    *size = 16384;
    return 0;
}
int host_statistics64(unsigned host, int flavor, uint32_t *out, uint32_t *count) {
    uint32_t pages[4] = {65536, 262144, 327680, 131072};
    if (host != 0x80000003u || flavor != 4) return 4;
    if (*count < 24 || *count > 256) return 5;
    memset(out, 0xff, 4 * (*count < 38 ? *count : 38));
    memcpy(out, pages, sizeof pages);
    *count = %s;
    return %s;
}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "libSystem.so"
    monkeypatch.setattr(macos_pages, "_LIBRARY", str(path))
    forget()
    yield path
    forget()


def forget() -> None:
    for kept in (macos_pages._library, macos_pages._host, macos_pages._page_bytes):
        kept.cache_clear()


def test_free_inactive_and_half_of_the_active_pages_are_available(library: Path) -> None:
    compile_library(library, STATISTICS % ("38", "0"))
    # 1 GiB free, 5 inactive, half of 4 active; 2 wired are not.
    assert [macos_pages.available_bytes() for _ in range(3)] == [8 * GIB] * 3
    # Each call of mach_host_self would leak a reference to the port.
    assert macos_pages._library().references() == 1


@pytest.mark.parametrize(("words", "status"), [("38", "5"), ("3", "0"), ("0", "0")])
def test_a_system_that_refuses_or_answers_less_is_unknown(
    words: str, status: str, library: Path
) -> None:
    compile_library(library, STATISTICS % (words, status))
    with pytest.raises(OSError, match=f"status {status}, {words} words"):
        macos_pages.available_bytes()


@pytest.mark.parametrize("source", ["", "int nothing;"])
def test_the_sensor_goes_on_without_the_reading(source: str, library: Path) -> None:
    if source:
        compile_library(library, source)
    reading = MacSensor(lambda: 0, lambda: 1, lambda *_: "").read()
    assert reading.available_bytes is None
    assert (reading.thermal, reading.memory) == (ThermalState.NOMINAL, ThermalState.NOMINAL)
    assert "available memory" in {problem.sensor for problem in reading.problems}


def test_the_sensor_reads_what_is_available(library: Path) -> None:
    compile_library(library, STATISTICS % ("38", "0"))
    assert MacSensor(lambda: 0, lambda: 1, lambda *_: "").read().available_bytes == 8 * GIB


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="host_statistics64 is on macOS only")
def test_this_mac_tells_what_is_available() -> None:
    forget()
    assert 0 < macos_pages.available_bytes() < psutil.virtual_memory().total
    assert macos_pages._page_bytes() == os.sysconf("SC_PAGE_SIZE")
