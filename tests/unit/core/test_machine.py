"""Which macOS this is, and which machine: neither by what a Python or the network says."""

import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from core import machine
from core.machine import machine_id, macos_build, macos_release, macos_release_of
from tests.fake_library import compile_library

IDENTITY = """
#include <string.h>
struct timespec_of_macos { long seconds, nanoseconds; };
int gethostuuid(unsigned char *id, const struct timespec_of_macos *wait) {
    if (wait->seconds != 1 || wait->nanoseconds != 0) return -1;
    memset(id, 7, 16);
    return %d;
}
"""


@pytest.mark.parametrize(
    ("darwin", "macos"),
    [
        ("20.6.0", 11),
        ("23.6.0", 14),
        ("24.4.0", 15),
        ("25.0.0", 26),
        ("26.1.0", 27),
        ("19.6.0", 0),
        ("", 0),
        ("x86", 0),
    ],
)
def test_the_kernels_release_tells_macos(darwin: str, macos: int) -> None:
    assert macos_release_of(darwin) == macos


def test_macos_26_is_told_from_what_an_old_python_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("16.0", ("", "", ""), "arm64"))
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(release="25.0.0"))
    assert macos_release() == 26


BUILD = """
#include <string.h>
int sysctlbyname(const char *name, void *old, size_t *size, void *new, size_t length) {
    if (strcmp(name, "kern.osversion") || *size < 16 || new || length) return -1;
    strcpy(old, "%s");
    *size = strlen(old) + 1;
    return 0;
}
"""


def test_the_build_tells_updates_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LIBRARY", str(tmp_path / "missing"))
    unknown = macos_build()
    # A part of a file's name, whatever the system says.
    assert re.fullmatch("[0-9a-f]{8}", unknown)
    for number, (says, build) in enumerate([("24E248", "24E248"), ("../x", unknown)]):
        library = compile_library(tmp_path / f"libSystem{number}.so", BUILD % says)
        monkeypatch.setattr(machine, "_LIBRARY", str(library))
        assert macos_build() == build


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS has builds")
def test_this_macs_build_is_that_of_sw_vers() -> None:
    asked = subprocess.run(["sw_vers", "-buildVersion"], capture_output=True, text=True, check=True)
    assert macos_build() == asked.stdout.strip()


@pytest.mark.skipif(sys.platform == "darwin", reason="this is macOS")
def test_other_systems_are_no_macos() -> None:
    assert macos_release() == 0


def test_the_machines_id_does_not_follow_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("mac.local", "dhcp-17.example.org"):
        monkeypatch.setattr(platform, "node", lambda name=name: name)
        machine_id.cache_clear()
        found.append(machine_id())
    assert found[0] == found[1]
    assert re.fullmatch("[0-9a-f]{16}|local", found[0])


def test_linux_asks_the_next_file_where_one_is_missing_or_empty(tmp_path: Path) -> None:
    empty, boot = tmp_path / "machine-id", tmp_path / "boot_id"
    empty.write_text("\n")
    boot.write_text("0f0e0d0c-0b0a-0908-0706-050403020100\n")
    files = (tmp_path / "absent", empty, boot)
    assert machine._linux_id(files) == boot.read_bytes().strip()
    assert machine._linux_id(files[:2]) == b""


@pytest.mark.parametrize(("status", "found"), [(0, b"\7" * 16), (-1, b"")])
def test_macos_is_asked_for_its_uuid(status: int, found: bytes, tmp_path: Path) -> None:
    library = compile_library(tmp_path / "libSystem.so", IDENTITY % status)
    assert machine._mac_id(str(library)) == found


def test_a_macos_without_the_function_has_no_uuid(tmp_path: Path) -> None:
    assert machine._mac_id(str(compile_library(tmp_path / "empty.so", "int nothing;"))) == b""
    assert machine._mac_id(str(tmp_path / "absent.so")) == b""


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="gethostuuid is on macOS only")
def test_this_mac_has_a_uuid() -> None:
    assert len(machine._mac_id()) == 16
