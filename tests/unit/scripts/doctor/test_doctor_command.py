"""Tests of the command scripts/doctor itself, in a repository whose path has spaces."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scripts.doctor_lib.machine import ROOT


@dataclass
class Copy:
    """A repository without a virtual environment, and a user without any files."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The repository."""
        return self.folder / "my disk" / "im petus"

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run the command; return its code and its output."""
        command = [str(self.root / "scripts" / "doctor"), "--report", str(self.folder / "report")]
        done = subprocess.run(
            [*command, *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    def files(self) -> set[Path]:
        """Return what is in the repository, the home folder and the temporary one."""
        return {path for path in self.folder.rglob("*") if "report" not in path.parts}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A repository before set-up, with the only Python of this test on PATH."""
    found = Copy(tmp_path)
    for room in ("core", "scripts"):
        shutil.copytree(
            ROOT / room, found.root / room, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("home", "bin", "temporary", "report"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found.environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHON": str(tmp_path / "bin" / "python3"),
        "IMPETUS_PORT": str(port),
    }
    return found


def test_before_set_up_it_reaches_its_end_and_leaves_only_the_report(copy: Copy) -> None:
    before = copy.files()
    code, output = copy.run()
    assert code in (0, 1, 2), output
    assert "skip  server                      scripts/setup has not run yet" in output
    assert "\nok    Python   " in output
    assert "not finished" not in output
    assert copy.files() == before
    text, data = sorted((copy.folder / "report").iterdir(), reverse=True)
    document = json.loads(data.read_text())
    assert document["is_whole"] is True
    assert set(document["seconds"]) == {
        *("system", "tools", "pythons", "packages", "readings", "compute", "server")
    }
    for path in (text, data):
        assert "im petus" not in path.read_text()
        assert str(copy.folder / "home") not in path.read_text()


def test_an_environment_whose_python_is_gone_is_named_with_its_cure(copy: Copy) -> None:
    python = copy.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/no/such/python3.12")
    code, output = copy.run("--steps", "pythons,packages,server")
    assert code == 1
    assert "(rm -rf .venv, then scripts/setup torch)" in output
    assert "skip  server                      the Python of .venv does not start" in output


def test_a_busy_port_is_named_with_its_cure(copy: Copy) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen(4)
        port = other.getsockname()[1]
        copy.environment["IMPETUS_PORT"] = str(port)
        code, output = copy.run("--steps", "system")
    assert code == 1
    assert f"Another program listens on port {port} of 127.0.0.1." in output


def test_folders_that_cannot_be_used_are_named(copy: Copy) -> None:
    (copy.folder / "file").write_text("")
    copy.environment["IMPETUS_HOME"] = str(copy.folder / "file" / "home")
    copy.environment["IMPETUS_MODELS_PATH"] = str(copy.folder / "no models")
    code, output = copy.run("--steps", "system")
    assert code == 1
    assert f"{copy.folder / 'file'} is a file." in output
    assert "It cannot be read: No such file or directory." in output


def test_a_report_that_cannot_be_written_is_no_fault_of_the_machine(copy: Copy) -> None:
    (copy.folder / "report").rmdir()
    _, output = copy.run("--steps", "tools")
    assert "The report could not be written to" in output
    assert "Traceback" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="unshare is a command of Linux")
def test_without_any_network_it_reaches_its_end(copy: Copy) -> None:
    unshare = shutil.which("unshare")
    cut_off = [unshare or "", "--user", "--map-root-user", "--net"]
    if not unshare or subprocess.run([*cut_off, "true"], check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    command = [*cut_off, str(copy.root / "scripts" / "doctor"), "--steps", "system,pythons"]
    done = subprocess.run(
        [*command, "--report", str(copy.folder / "report")],
        env={**copy.environment, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode in (0, 1, 2), done.stderr
    assert f"ok    port                        {copy.environment['IMPETUS_PORT']} is free" in (
        done.stdout
    )
    assert os.path.exists(copy.folder / "report")
