"""Tests of what the doctor's rows tell, and of faults that show in more than one row."""

import os
import shutil
from typing import Any

import pytest

from scripts.doctor_lib import packages, system
from scripts.doctor_lib.machine import ROOT
from scripts.doctor_lib.row import FAIL, OK, SKIP, WARN
from tests.shell_programs.programs import write_program
from tests.unit.scripts.doctor.conftest import Plant, examine, find


@pytest.mark.parametrize(
    ("told", "value"),
    [
        ("Firewall is disabled. (State = 0)", "off"),
        ("Firewall is enabled. (State = 1)", "on; if macOS asks about Python, Deny is fine"),
        (
            "Firewall is blocking all non-essential incoming connections. (State = 2)",
            "blocks everything; if macOS asks about Python, Deny is fine",
        ),
        ("", "?; if macOS asks about Python, Deny is fine"),
    ],
)
def test_the_firewalls_state_is_read(plant: Plant, told: str, value: str) -> None:
    plant.firewall(told)
    assert find(examine(plant, "system"), "firewall").value == value


def test_an_environment_that_does_not_start_is_one_fault(plant: Plant) -> None:
    """Each of its packages and probes was one."""
    write_program(plant.python, "exit 127")
    rows = examine(plant, "pythons", "packages", "readings", "compute", "server")
    assert [row.what for row in rows if row.state in (FAIL, WARN)] == ["Python"]
    reasons = {row.value for row in rows if row.state == SKIP}
    assert reasons == {"the Python of .venv does not start"}


def test_an_environment_whose_python_was_removed_is_a_fault(plant: Plant) -> None:
    """As Homebrew does with an update; it was taken for one that was never set up."""
    plant.python.unlink()
    plant.python.symlink_to("/no/such/python3.12")
    row = find(examine(plant, "pythons"), "Python")
    assert (row.state, row.cure) == (FAIL, "rm -rf .venv, then scripts/setup torch")


def test_a_full_temporary_folder_is_told_by_the_compiler_and_by_its_row(plant: Plant) -> None:
    plant.environment["TMPDIR"] = "/var/folders/x/T"
    full = "fatal error: error writing to /var/folders/x/T/a.s: No space left on device"
    plant.program("c++", f"echo '{full}'", "echo 'compilation terminated.'", "exit 1")
    plant.free_bytes = 2**20
    row = find(examine(plant, "tools"), "C++ compiler")
    assert "No space left on device" in row.problem
    row = find(examine(plant, "system"), "free disk, temporary")
    assert row.cure == "free 1.0 GiB where /var/folders/x/T is"


def test_the_report_has_the_last_lines_of_a_probe_that_failed(plant: Plant) -> None:
    plant.set_up(
        "  *'starter by llama.cpp'*) echo 'ggml_metal: first'; echo last; kill -ABRT $$ ;;",
        "  *'import ray'*) echo Traceback; echo ImportError; exit 1 ;;",
    )
    rows = examine(plant, "packages", "compute")
    assert find(rows, "starter by llama.cpp").detail == "ggml_metal: first\nlast"
    assert find(rows, "import ray").detail == "Traceback\nImportError"


def test_what_a_healthy_mac_tells(plant: Plant) -> None:
    rows = examine(plant, "system", "pythons")
    assert find(rows, "macOS").value == "macOS 15 (Darwin 24.6.0); sw_vers says 15.6.1 24G90"
    assert find(rows, "chip").value == "Apple M3, 4 fast and 4 slow cores, Mac15,3"
    assert find(rows, "file system").value.startswith("apfs, case ")
    assert find(rows, "power").value == "AC Power, 83 %"
    assert "python3.12 3.12 arm64" in find(rows, "Pythons found").value


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("/dev/vda on / type ext4 (rw,relatime)", "ext4"),
        ("//u@nas/x on /srv type cifs (rw)\n/dev/vda on / type ext4 (rw)", "ext4"),
        ("map auto_home on / (autofs, automounted, nobrowse)", "autofs"),
        ("nonsense", ""),
    ],
)
def test_the_file_system_is_read_on_linux_too(plant: Plant, line: str, kind: str) -> None:
    plant.program("df", "echo '/dev/vda 1 1 1 1% /'")
    plant.program("mount", f"echo '{line}'")
    assert system.file_system(plant.machine("linux"), plant.folder) == kind


def test_a_data_folder_where_nothing_may_be_seen_is_found(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path.exists raised there, and the rows after it were missing."""
    plant.environment["IMPETUS_HOME"] = str(plant.folder / "closed" / "impetus")
    closed = plant.folder / "closed"
    closed.mkdir()
    stat, access = os.stat, os.access

    def refused(path: object, *arguments: Any, **named: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    rows = examine(plant, "system")
    assert find(rows, "data folder").problem == f"{closed} cannot be written to."
    assert rows[-1].what == "files per process"


def test_a_local_build_of_the_pinned_version_is_as_tested(plant: Plant) -> None:
    plant.set_up(versions={"numpy": plant.pins()["numpy"] + "+local"})
    row = find(examine(plant, "packages"), "versions")
    assert row.state == OK
    assert "+local" in row.detail


@pytest.mark.parametrize(
    ("on", "version", "state"),
    [
        ("darwin", "2.14.1", OK),
        ("darwin", "2.13.0", FAIL),
        ("linux", "2.13.0+cpu", OK),
        ("linux", "2.14.1", FAIL),
    ],
)
def test_a_pin_counts_on_its_own_system(plant: Plant, on: str, version: str, state: str) -> None:
    """PyTorch's pin of one system was taken for that of the other."""
    text = "torch==2.13.0; sys_platform != 'darwin'\ntorch==2.14.1; sys_platform == 'darwin'\n"
    (plant.root / "scripts" / "constraints.txt").write_text(text)
    plant.set_up(versions={"torch": version})
    assert find(examine(plant, "packages", on=on), "versions").state == state


def test_the_constraints_pin_every_package_once() -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    named = {line.split("==")[0] for line in lines if "==" in line}
    for on in ("darwin", "linux"):
        assert packages.pinned("\n".join(lines), on).keys() == named


def test_probes_run_with_the_servers_settings_of_libraries(plant: Plant) -> None:
    """OpenMP's threads spun, which slowed two probes on two processors down severely."""
    shutil.copy(ROOT / "scripts" / "env", plant.root / "scripts" / "env")
    plant.environment["KMP_BLOCKTIME"] = "7"
    plant.set_up("  *settings*) env ;;")
    told = plant.machine().run_python("-c", "settings", limit_s=10.0).text.splitlines()
    assert {"GOMP_SPINCOUNT=4000", "KMP_BLOCKTIME=7", "PYTORCH_ENABLE_MPS_FALLBACK=1"} <= set(told)
    assert not [line for line in told if line.startswith("RAY_")]
