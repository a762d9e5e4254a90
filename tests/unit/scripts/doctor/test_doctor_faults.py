"""Tests that the doctor finds each planted fault, with the cure, and nothing on a healthy Mac."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.doctor_lib import packages, system
from scripts.doctor_lib.__main__ import checked, main
from scripts.doctor_lib.machine import ROOT
from scripts.doctor_lib.row import FAIL, OK, SKIP, WARN, Row
from tests.shell_programs.programs import write_program
from tests.unit.scripts.doctor.conftest import (
    BATTERY,
    LOCAL_STEPS,
    PMSET,
    Plant,
    examine,
    find,
)

LICENCE = "You have not agreed to the Xcode license agreements. Please run 'sudo xcodebuild'"


def test_a_healthy_mac_has_no_fault(plant: Plant) -> None:
    rows = examine(plant)
    assert [row.lines() for row in rows if row.state in (FAIL, WARN)] == []
    assert len([row for row in rows if row.state == OK]) > 45


def test_a_mac_before_set_up_has_no_fault(plant: Plant) -> None:
    plant.unset()
    rows = examine(plant)
    assert [row.lines() for row in rows if row.state in (FAIL, WARN)] == []
    assert find(rows, "packages").value == "scripts/setup has not run yet"


def macos_13(plant: Plant) -> None:
    plant.program("uname", "case $1 in -s) echo Darwin ;; *) echo 22.6.0 ;; esac")


def macos_14(plant: Plant) -> None:
    plant.program("uname", "case $1 in -s) echo Darwin ;; *) echo 23.6.0 ;; esac")


def rosetta(plant: Plant) -> None:
    plant.values["sysctl.proc_translated"] = "1"


def intel(plant: Plant) -> None:
    plant.values["hw.optional.arm64"] = "0"


def little_memory(plant: Plant) -> None:
    plant.values["hw.memsize"] = str(8 * 2**30)


def full_disk(plant: Plant) -> None:
    plant.free_bytes = 2**29


def home_is_a_file(plant: Plant) -> None:
    (plant.folder / "file").write_text("")
    plant.environment["IMPETUS_HOME"] = str(plant.folder / "file" / "impetus")


def foreign_disk(plant: Plant) -> None:
    plant.mounted("exfat, local, nodev, nosuid, noowners")


def hidden_models(plant: Plant) -> None:
    """As macOS answers a terminal that may not see a folder of documents."""
    plant.environment["IMPETUS_MODELS_PATH"] = "~/Documents/models"
    plant.program("ls", 'echo "ls: $2: Operation not permitted" >&2', "exit 1")


def missing_models(plant: Plant) -> None:
    plant.environment["IMPETUS_MODELS_PATH"] = f"{plant.folder}:{plant.folder / 'no such'}"


def models_of_a_dead_server(plant: Plant) -> None:
    plant.environment["IMPETUS_MODELS_PATH"] = "/Volumes/share"
    plant.program("ls", "sleep 60")


def long_socket_path(plant: Plant) -> None:
    plant.environment["RAY_TMPDIR"] = "/tmp/" + "a" * 60


def open_proxy(plant: Plant) -> None:
    plant.environment["RAY_SERVE_ENABLE_HA_PROXY"] = "1"


def bad_port(plant: Plant) -> None:
    plant.environment["IMPETUS_PORT"] = "eight"


def agents_sandbox(plant: Plant) -> None:
    plant.program("sandbox-exec", "echo sandbox_apply: Operation not permitted >&2", "exit 71")


def hot(plant: Plant) -> None:
    plant.program("notifyutil", "echo com.apple.system.thermalpressurelevel 2")


def short_of_memory(plant: Plant) -> None:
    plant.values["kern.memorystatus_vm_pressure_level"] = "4"


def low_power(plant: Plant) -> None:
    plant.pmset(PMSET.replace("lowpowermode         0", "lowpowermode         1"), BATTERY)


def wired_limit(plant: Plant) -> None:
    plant.values["iogpu.wired_limit_mb"] = "16000"


def panic(plant: Plant) -> None:
    folder = plant.top / "Library" / "Logs" / "DiagnosticReports"
    folder.mkdir(parents=True)
    (folder / "Kernel-2026-11-29.panic").write_text(
        'panic(cpu 6): "completeMemory() prepare count underflow" @IOGPUMemory.cpp:550'
    )


def crash(plant: Plant) -> None:
    folder = plant.home / "Library" / "Logs" / "DiagnosticReports"
    folder.mkdir(parents=True)
    (folder / "python3.12-2026-11-29.ips").write_text("{}")


def no_tools(plant: Plant) -> None:
    plant.unset()
    plant.shims()


def removed_tools(plant: Plant) -> None:
    plant.unset()
    plant.shims()
    plant.program("xcode-select", "echo /no/such/Xcode.app")


def licence(plant: Plant) -> None:
    plant.unset()
    plant.program("c++", f'echo "{LICENCE}" >&2', "exit 69")


def no_metal(plant: Plant) -> None:
    plant.compiler("echo 'no Metal device, working set 0 MiB'")


def only_python_3_14(plant: Plant) -> None:
    plant.unset()
    plant.bin.joinpath("python3.12").unlink()
    # Shadows the system's own, which would be suitable.
    for name in ("3.11", "3.12", "3.13", "3"):
        plant.program(f"python{name}", "echo '3.14 arm64 '")
    plant.environment["PYTHON"] = str(plant.bin / "python3")


def old_sqlite(plant: Plant) -> None:
    plant.set_up("  *sqlite3*) echo '3.12.1 arm64 SQLite 3.36.0 OpenSSL 3.0' ;;")


def python_without_ssl(plant: Plant) -> None:
    plant.set_up("  *sqlite3*) echo \"ModuleNotFoundError: No module named 'ssl'\"; exit 1 ;;")


def wrong_heat(plant: Plant) -> None:
    said = "The system's tools say heat heavy, memory nominal."
    result = json.dumps({"value": "heat nominal", "problem": said, "cure": "x", "state": "warn"})
    plant.set_up(f"  *'heat and pressure'*) cat '{plant.folder}/found' ;;")
    (plant.folder / "found").write_text(result)


def broken_environment(plant: Plant) -> None:
    write_program(plant.python, "exit 127")


def interrupted(plant: Plant) -> None:
    (plant.root / ".venv" / "installed-runtime").unlink()


def other_version(plant: Plant) -> None:
    plant.set_up(versions={"numpy": "1.0"})


def old_metal(plant: Plant) -> None:
    plant.set_up(tag="15")
    plant.program("uname", "case $1 in -s) echo Darwin ;; *) echo 25.1.0 ;; esac")


def two_openmp(plant: Plant) -> None:
    site = plant.root / ".venv" / "lib" / "python3.12" / "site-packages"
    for name in ("torch/lib", "sklearn/.dylibs"):
        (site / name).mkdir(parents=True)
        (site / name / "libomp.dylib").write_text("")


def import_fails(plant: Plant) -> None:
    plant.set_up("  *'import ray'*) echo ModuleNotFoundError: ray; exit 1 ;;")


def import_aborts(plant: Plant) -> None:
    plant.set_up("  *'import torch'*) echo 'OMP: Error #15'; kill -ABRT $$ ;;")


def import_hangs(plant: Plant) -> None:
    plant.set_up("  *'import numpy'*) sleep 60 ;;")


def without_metal(plant: Plant) -> None:
    plant.set_up("  *'import llama_cpp'*) echo 0.3.36 CPU ;;")


def refused_starter(plant: Plant) -> None:
    result = '{"value": "Refused", "problem": "ended with code 71", "cure": "x", "state": "FAIL"}'
    plant.set_up(f"  *'own_readings inspection'*) echo '{result}' ;;")


def probe_crashes(plant: Plant) -> None:
    plant.set_up("  *'starter by llama.cpp'*) kill -SEGV $$ ;;")


def wrong_sums(plant: Plant) -> None:
    result = '{"value": "mps", "problem": "It differs", "cure": "x", "state": "FAIL"}'
    plant.set_up(f"  *'computations PyTorch'*) echo '{result}' ;;")


FAULTS: list[tuple[Callable[[Plant], None], str, str, str, str]] = [
    (macos_13, "system", "system", FAIL, "needs macOS 14 or later; this Mac runs macOS 13"),
    (macos_14, "system", "macOS", WARN, "Core ML language models need macOS 15"),
    (rosetta, "system", "system", FAIL, "Run: arch -arm64 zsh"),
    (intel, "system", "system", FAIL, "Intel processor"),
    (little_memory, "system", "memory", WARN, "use small models"),
    (full_disk, "system", "free disk, data", FAIL, "free 0.5 GiB"),
    (home_is_a_file, "system", "data folder", FAIL, "set IMPETUS_HOME"),
    (foreign_disk, "system", "file system", WARN, "not safe on exfat"),
    (hidden_models, "system", "model folders", WARN, "Privacy & Security"),
    (missing_models, "system", "model folders", WARN, "No such file or directory"),
    (models_of_a_dead_server, "system", "model folders", WARN, "did not end within"),
    (long_socket_path, "system", "path of Ray's socket", FAIL, "unset RAY_TMPDIR"),
    (open_proxy, "system", "Ray's variables", FAIL, "unset RAY_SERVE_ENABLE_HA_PROXY"),
    (bad_port, "system", "port", FAIL, "unset IMPETUS_PORT"),
    (agents_sandbox, "system", "sandbox-exec", WARN, "from a terminal of your own"),
    (hot, "system", "heat", WARN, "let it cool down"),
    (short_of_memory, "system", "memory pressure", WARN, "close programs"),
    (low_power, "system", "power", WARN, "Low-power mode"),
    (wired_limit, "system", "GPU's wired limit", WARN, "sudo sysctl iogpu.wired_limit_mb=0"),
    (panic, "system", "panics and crashes", WARN, "The GPU's driver stopped this Mac"),
    (crash, "system", "panics and crashes", WARN, "python3.12-2026-11-29.ips"),
    (no_tools, "tools,pythons", "Apple's tools", FAIL, "xcode-select --install"),
    (removed_tools, "tools,pythons", "Apple's tools", FAIL, "sudo xcode-select --reset"),
    (licence, "tools", "C++ compiler", FAIL, "sudo xcodebuild -license accept"),
    (no_metal, "tools", "C++ compiler", WARN, "get no Metal device"),
    (only_python_3_14, "pythons", "Python", FAIL, "is Python 3.14"),
    (old_sqlite, "pythons", "Python", FAIL, "older than 3.37"),
    (python_without_ssl, "pythons", "Python", FAIL, "No module named 'ssl'"),
    (broken_environment, "pythons", "Python", FAIL, "rm -rf .venv"),
    (interrupted, "packages", "set-up", FAIL, "scripts/setup torch"),
    (other_version, "packages", "versions", FAIL, "numpy 1.0 instead of"),
    (old_metal, "packages", "MLX' Metal library", WARN, "the build for macOS 15; this is 26"),
    (two_openmp, "packages", "OpenMP libraries", WARN, "Error #15"),
    (
        import_fails,
        "packages",
        "import ray",
        FAIL,
        "everything cannot be used: ModuleNotFoundError: ray",
    ),
    (import_aborts, "packages", "import torch", WARN, "crashed with SIGABRT"),
    (import_hangs, "packages", "import numpy", FAIL, "did not end within"),
    (without_metal, "packages", "import llama_cpp", WARN, "not built for this Mac"),
    (refused_starter, "readings", "inspection of a model", FAIL, "ended with code 71"),
    (wrong_heat, "readings", "heat and pressure", WARN, "tools say heat heavy"),
    (probe_crashes, "compute", "starter by llama.cpp", FAIL, "crashed with SIGSEGV"),
    (wrong_sums, "compute", "PyTorch", FAIL, "It differs"),
]


@pytest.mark.parametrize(
    ("fault", "steps", "what", "state", "says"),
    FAULTS,
    ids=[fault.__name__ for fault, *_ in FAULTS],
)
def test_a_planted_fault_is_found(
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Plant], None],
    steps: str,
    what: str,
    state: str,
    says: str,
) -> None:
    monkeypatch.setattr(packages, "_IMPORT_LIMIT_S", 1.0)
    monkeypatch.setattr(system, "_LIST_LIMIT_S", 1.0)
    fault(plant)
    row = find(examine(plant, *steps.split(",")), what)
    assert row.state == state, row.lines()
    assert says in "\n".join(row.lines())
    assert not plant.opened.exists()


def test_another_program_on_the_port_is_found(plant: Plant) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen(4)
        port = other.getsockname()[1]
        plant.environment["IMPETUS_PORT"] = str(port)
        row = find(system.rows(plant.machine()), "port")
    assert row.state == FAIL
    assert f"IMPETUS_PORT={port + 10} scripts/serve" in row.cure


def test_without_a_compiler_on_linux_the_package_is_named(plant: Plant) -> None:
    plant.unset()
    plant.environment["CXX"] = "no-such-compiler"
    row = find(examine(plant, "tools", on="linux"), "C++ compiler")
    assert (row.state, row.cure) == (FAIL, "for example: apt-get install build-essential")


def test_every_row_of_a_mac_is_skipped_elsewhere_with_its_reason(plant: Plant) -> None:
    there = {row.what for row in examine(plant)}
    here = {row.what: row for row in examine(plant, on="linux")}
    assert there == here.keys()
    skipped = [row for row in here.values() if row.state == SKIP]
    assert len(skipped) > 15
    assert {row.value for row in skipped} == {"only a Mac can show it"}


def test_a_check_that_breaks_does_not_stop_the_others(plant: Plant) -> None:
    def broken(_: object) -> Iterator[Row]:
        yield Row("first", OK, "")
        raise ValueError("odd")

    rows = list(checked((broken, system.rows), plant.machine()))
    assert rows[1].problem == "The check itself failed: ValueError: odd"
    assert rows[-1].what == "uptime"


@pytest.mark.parametrize(
    ("fault", "code"), [(None, 0), (hot, 2), (rosetta, 1)], ids=["none", "warning", "stopper"]
)
def test_the_exit_code_tells_the_worst(
    plant: Plant, fault: Callable[[Plant], None] | None, code: int
) -> None:
    if fault:
        fault(plant)
    arguments = ["--steps", "system,tools", "--report", str(plant.folder)]
    assert main(arguments, plant.machine()) == code


def test_an_unknown_step_is_refused(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "system,magic"], plant.machine())
    assert "magic is not a step; the steps are system, tools" in capsys.readouterr().err


def test_nothing_is_left_behind_but_the_report(plant: Plant) -> None:
    mark = plant.folder / "mark"
    plant.set_up(f"  *'import numpy'*) sh -c 'sleep 3; echo late >{mark}' & echo 1.0 ;;")
    before = sorted(path for path in plant.root.rglob("*"))
    reports = plant.folder / "reports"
    reports.mkdir()
    main(["--steps", ",".join(LOCAL_STEPS), "--report", str(reports)], plant.machine())
    assert sorted(path.suffix for path in reports.iterdir()) == [".json", ".txt"]
    assert list((plant.folder / "temporary").iterdir()) == []
    assert sorted(path for path in plant.root.rglob("*")) == before
    end = time.monotonic() + 4
    while time.monotonic() < end and not mark.exists():
        time.sleep(0.2)
    assert not mark.exists()


def oldest_python() -> Path | None:
    """Return a Python 3.9 of this machine."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob("3.9*/bin/python3"))
    return found[0] if found else None


def test_python_3_9_is_enough_before_set_up(plant: Plant) -> None:
    python = oldest_python()
    if python is None:
        pytest.skip("there is no Python 3.9 here")
    from scripts.doctor_lib.child import run

    command = [str(python), "-B", "-m", "scripts.doctor_lib", "--steps", "system,pythons"]
    command += ["--report", str(plant.folder)]
    done = run(command, 60.0, {**os.environ, "IMPETUS_PORT": "1"}, str(ROOT))
    assert done.code in (0, 2), done.text
    assert "ok    port" in done.text
    assert sys.version_info[:2] != (3, 9)
