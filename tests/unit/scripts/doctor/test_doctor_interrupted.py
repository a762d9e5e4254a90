"""Tests that a doctor that is interrupted leaves no process, folder or port behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.doctor_lib.child import in_order, run
from scripts.doctor_lib.machine import ROOT
from tests.shell_programs.programs import write_program
from tests.unit.scripts.doctor.conftest import Plant

STAND_IN = Path(__file__).with_name("stand_in_server.py")
LIMIT_S = 20.0
# The doctor with the stand-in for the server, on a repository that the arguments name.
DOCTOR = """
import sys
from pathlib import Path
from scripts.doctor_lib import __main__ as doctor, server
from scripts.doctor_lib.machine import Machine
step, stand_in, root, report = sys.argv[1:]
server._LAUNCHER = (stand_in, "never_ready")
machine = Machine(system="linux", root=Path(root))
sys.exit(doctor.main(["--steps", step, "--report", report], machine))
"""


def commands() -> list[str]:
    done = subprocess.run(["ps", "-axwwo", "command="], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def interrupted(step: str, root: Path, folder: Path, mark: str, number: int) -> str:
    """Run a step until a command has `mark`, send the signal twice, return the output."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-B", "-c", DOCTOR, step, str(STAND_IN), str(root), str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert wait_for(lambda: any(mark in line for line in commands()))
        process.send_signal(number)
        process.send_signal(number)
        output, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert not any(mark in line for line in commands())
    return str(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_server_is_stopped(tmp_path: Path, number: int) -> None:
    python = tmp_path / "root" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    before = set(Path("/tmp").glob("impetus-doctor-*"))
    mark = f"{python} -B {STAND_IN}"
    output = interrupted("server", tmp_path / "root", tmp_path, mark, number)
    assert "Interrupted: what it had started is stopped." in output
    report = next(tmp_path.glob("*.json"))
    assert json.loads(report.read_text())["is_whole"] is False
    left = set(Path("/tmp").glob("impetus-doctor-*")) - before
    assert not any((folder / "home").exists() for folder in left)


def test_interrupted_probes_are_ended(plant: Plant, tmp_path: Path) -> None:
    # Both lanes hang.
    write_program(plant.python, f"exec -a hangs-{os.getpid()} sleep 60")
    plant.python.write_text(plant.python.read_text().replace("#!/bin/sh", "#!/bin/bash"))
    folder = tmp_path / "temporary"
    interrupted("readings", plant.root, folder, f"hangs-{os.getpid()}", signal.SIGTERM)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".txt"]


def test_what_a_killed_probe_left_in_its_temporary_folder_is_removed(plant: Plant) -> None:
    plant.set_up("  *'import numpy'*) echo x >\"$TMPDIR/model\"; kill -9 $$ ;;")
    done = plant.machine().run_python("-c", "import numpy", limit_s=10.0)
    assert done.ended == "crashed with SIGKILL"
    assert list((plant.folder / "temporary").iterdir()) == []


def test_tasks_run_in_lanes_and_their_results_keep_their_order() -> None:
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    began = time.monotonic()
    tasks = [lambda s=s: sleep(s) for s in (0.6, 0.1, 0.2, 0.3)]
    assert list(in_order(tasks, 2)) == [0.6, 0.1, 0.2, 0.3]
    assert time.monotonic() - began < 1.1


def test_commands_of_lanes_that_are_given_up_are_ended() -> None:
    began = time.monotonic()
    tasks = [lambda s=s: run(["sleep", s], 60.0, os.environ).code for s in ("0", "55", "56", "57")]
    results = in_order(tasks, 2)
    assert next(results) == 0
    results.close()
    assert time.monotonic() - began < 10
