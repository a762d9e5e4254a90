"""All that writes to disk, on a disk that is really full: in a child process, which must live."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.engine.accelerator_lock import AcceleratorLock
from backends.prefixes.block_file import ROOT as ROOT_KEY
from backends.prefixes.block_file import block_head
from backends.prefixes.disk import DiskLimits, PrefixFolder
from catalog.store import CatalogStore
from core.errors import ImpetusError, Unavailable
from deployments.scheduler.faults import FaultFile
from scheduler.faults import FaultRecord
from tests.prefixes import prompt_of, state_of

ROOT = Path(__file__).parents[2]

CHILD = """
import json, os, resource, signal, sys
from pathlib import Path

import numpy as np

from backends.engine.accelerator_lock import AcceleratorLock
from backends.prefixes.disk import RETRY_S, DiskLimits, PrefixFolder
from backends.prefixes.store import BlockStore
from catalog.store import CatalogStore
from core.errors import CatalogNotWritten, Unavailable
from core.files import write_atomically
from deployments.activity import ActivityFile
from deployments.scheduler.faults import FaultFile
from scheduler.faults import FaultRecord
from tests.prefixes import place_in, prompt_of
from tests.unit.catalog.builders import make_found, write

folder, how = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
report = {}
now = [0.0]
limits = DiskLimits(1 << 26, floor_bytes=0)
clocks = {"clock": lambda: now[0], "free_bytes": lambda _: 1 << 40}
blocks = PrefixFolder(folder / "prefixes", limits, **clocks)
store = BlockStore(blocks, 0)
model = place_in(store).open("layout")


def keep(seed):
    model.put(prompt_of(1, seed), 0, np.full(50_000, seed, np.uint8))
    return store.flush(20) and len(model.chain(prompt_of(1, seed))) == 1


def fill():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def free():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    else:
        (folder / "filler").unlink()


def change():
    try:
        write(catalog, *(make_found(f"/m/{n}.gguf", name=f"n{n}") for n in range(200)))
    except CatalogNotWritten as problem:
        return problem.code
    return "written"


def opens(name):
    try:
        AcceleratorLock(folder / name).close()
    except Unavailable:
        return False
    return True


def turns():
    for _ in range(600):
        with lock.hold():
            pass
    return True


def replaced():
    try:
        write_atomically(folder / "state", b"new" * 1000)
    except OSError:
        pass
    return (folder / "state").read_bytes()[:3].decode()


catalog = CatalogStore(folder / "catalog.sqlite")
write(catalog, make_found())
lock = AcceleratorLock(folder / "turns")
lock.register()
faults = FaultFile(folder / "faults", "session")
write_atomically(folder / "state", b"old")


def look(name):
    faults.write({"model": FaultRecord("files")})
    activity = ActivityFile(folder / "activity" / name)
    activity.open_model("model")
    activity.close()
    report[name] = {
        "old block": not isinstance(
            store.read(model, model.chain(prompt_of(1, 1))[0]), str
        ),
        "new block": keep(len(report) + 2),
        "catalog": change(),
        "models": len(catalog.models()),
        "turns": turns(),
        "new lock": opens(f"turns-{name}"),
        "state": replaced(),
    }


assert keep(1)
fill()
look("full")
free()
now[0] += RETRY_S
look("freed")
store.close()
report["left"] = [str(path.relative_to(folder)) for path in folder.rglob("*tmp*")]
report["left"] += [path.name for path in folder.glob(".state*")]
print(json.dumps(report))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root can mount a small file system")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this system does not let root mount a small file system")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def outcome(folder: Path, how: str) -> dict[str, Any]:
    """Run the child, whose log is on the same disk."""
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), how],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=120,
            check=False,
        )
    text = (folder / "log").read_text()
    assert done.returncode == 0, text
    assert "are written to" in text
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check(report: dict[str, Any]) -> None:
    full, freed = report["full"], report["freed"]
    assert full.pop("new lock") in (False, True)
    assert full == {
        "old block": True, "new block": False, "catalog": "catalog_not_written", "models": 1,
        "turns": True, "state": "old",
    }  # fmt: skip
    assert freed == {
        "old block": True, "new block": True, "catalog": "written", "models": 201,
        "turns": True, "new lock": True, "state": "new",
    }  # fmt: skip
    assert report["left"] == []


def test_a_full_disk_ends_no_process_and_is_over_when_there_is_room(small_disk: Path) -> None:
    check(outcome(small_disk, "disk"))


def test_a_limit_of_file_sizes_ends_no_process(tmp_path: Path) -> None:
    check(outcome(tmp_path, "limit"))


def test_a_read_only_disk_is_told_and_what_is_on_it_is_read(small_disk: Path) -> None:
    folder = PrefixFolder(small_disk / "prefixes", DiskLimits(1 << 26, floor_bytes=0))
    head = block_head(b"f" * 32, ROOT_KEY, 0, prompt_of(1), state_of(1))
    path = folder.write("model", [(head, state_of(1))]).paths[head.key]
    CatalogStore(small_disk / "catalog.sqlite").close()
    AcceleratorLock(small_disk / "turns").close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    opened = len(os.listdir("/dev/fd"))
    again = PrefixFolder(small_disk / "prefixes", DiskLimits(1 << 26, floor_bytes=0))
    assert list(again.scan("model", b"f" * 32)[0]) == [path]
    assert not isinstance(again.read(path, head), str)
    again.touch([path])
    assert again.write("model", [(head, state_of(1))]).paths == {}
    assert not again.is_writable
    assert again.claim_ram(10, 100) == 0
    FaultFile(small_disk / "faults", "session").write({"model": FaultRecord("files")})
    with pytest.raises(ImpetusError, match="read-only"):
        CatalogStore(small_disk / "catalog.sqlite")
    with pytest.raises(Unavailable, match="the file system is read-only"):
        AcceleratorLock(small_disk / "turns")
    assert len(os.listdir("/dev/fd")) == opened
