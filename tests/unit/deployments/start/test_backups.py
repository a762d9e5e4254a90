"""Caches are not backed up on macOS, and a file system that cannot say so stops nothing."""

import os
import plistlib
import subprocess
import sys
from pathlib import Path

import pytest

from core.settings import Settings
from deployments.start import backups
from deployments.start.backups import keep_out_of_backups
from deployments.start.checks import prepare_start
from tests.fake_library import compile_library

# Writes the attribute's name and value to a file `attribute` in the folder; ENOTSUP as on FAT.
LIBRARY = """
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
int setxattr(const char *path, const char *name, const void *value, size_t size,
             uint32_t position, int options) {
    char target[4096];
    if (%d) { errno = ENOTSUP; return -1; }
    if (position || options) return -1;
    snprintf(target, sizeof target, "%%s/attribute", path);
    FILE *file = fopen(target, "w");
    fprintf(file, "%%s\\n", name);
    fwrite(value, 1, size, file);
    return fclose(file);
}
"""


@pytest.fixture
def library(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> Path:
    fails = getattr(request, "param", False)
    found = compile_library(tmp_path / "libSystem.so", LIBRARY % fails)
    monkeypatch.setattr(backups, "_LIBRARY", str(found))
    monkeypatch.setattr("sys.platform", "darwin")
    return found


@pytest.mark.usefixtures("library")
def test_the_folder_gets_time_machines_attribute_and_is_not_indexed(tmp_path: Path) -> None:
    cache = tmp_path / "home with space" / "cache"
    for _ in range(2):
        keep_out_of_backups(cache)
    name, _, value = (cache / "attribute").read_bytes().partition(b"\n")
    assert name == b"com.apple.metadata:com_apple_backup_excludeItem"
    assert plistlib.loads(value) == "com.apple.backupd"
    assert (cache / ".metadata_never_index").is_file()


@pytest.mark.parametrize("library", [True], indirect=True)
@pytest.mark.usefixtures("library")
def test_a_drive_without_attributes_is_used_all_the_same(tmp_path: Path) -> None:
    keep_out_of_backups(tmp_path / "cache")
    assert (tmp_path / "cache" / ".metadata_never_index").is_file()


def test_other_systems_get_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    keep_out_of_backups(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_servers_cache_is_kept_out_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_out: list[Path] = []
    monkeypatch.setattr("deployments.start.checks.keep_out_of_backups", kept_out.append)
    for name in ("end_former_servers", "remove_former_folders", "check_port"):
        monkeypatch.setattr(f"deployments.start.checks.{name}", lambda *_: None)
    monkeypatch.setattr("deployments.start.checks.read_settings", lambda _: Settings(home=tmp_path))
    settings = prepare_start(tmp_path / "any.yaml")
    assert kept_out == [tmp_path / "cache"]
    assert settings.prefix_folder.is_relative_to(kept_out[0])


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Time Machine is on macOS only")
def test_this_macs_time_machine_leaves_the_folder_out(tmp_path: Path) -> None:
    keep_out_of_backups(tmp_path / "cache")
    command = ["tmutil", "isexcluded", os.fspath(tmp_path / "cache")]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "[Excluded]" in asked.stdout
