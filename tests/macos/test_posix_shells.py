"""The scripts run in every POSIX shell, with macOS' programs, from a folder of any name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deployments.start.environment import ray_settings
from scripts.install import ROOT
from tests.shell_programs.programs import POSIX_SHELLS, shell_command

SHELLS = {**POSIX_SHELLS, "zsh": ("zsh", "--emulate", "sh")}
SCRIPTS = sorted(
    path
    for folder in ("scripts", ".ci")
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/bin/sh")
)
# Programs of Linux, and options of GNU's, that macOS does not have.
MISSING = ("flock", "free", "nproc", "setsid", "tac", "timeout", "wget")
GNU = ("sed -i", "grep -P", "xargs -r", "head -n -", "ls --", "stat -c", "date -d", "readlink -f")


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> Sequence[str]:
    """A shell; skips the test where it is not installed."""
    return shell_command(*SHELLS[request.param])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(script: Path, shell: Sequence[str]) -> None:
    done = subprocess.run([*shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def check(script: Path) -> str:
    """Return what shellcheck says of a script."""
    program = Path(sys.executable).with_name("shellcheck")
    assert program.is_file(), "shellcheck is missing; run scripts/setup dev torch"
    command = [str(program), "--shell=sh", "--format=gcc", "--external-sources", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_nothing_that_only_some_shells_know(script: Path) -> None:
    assert check(script) == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[[ -n $1 ]]", "SC3010"),
        ("for each in ${PYTHON:-python3}; do echo $each; done", "SC2086"),
        ("local_name=(a b)", "SC3030"),
        ("echo ${1//a/b}", "SC3060"),
    ],
)
def test_what_only_some_shells_know_is_found(line: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\n{line}\n")
    assert said in check(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_uses_no_program_that_macos_lacks(script: Path) -> None:
    lines = [line.partition("#")[0] for line in script.read_text().splitlines()]
    words = {word.strip("$()\"'`") for line in lines for word in line.split()}
    assert words.isdisjoint(MISSING)
    assert [option for option in GNU for line in lines if option in line] == []


PRINTED = "import json, os; print(json.dumps(dict(os.environ)))"


def test_serve_run_by_hand_gets_the_same_settings(shell: Sequence[str]) -> None:
    script = f"set -a; . '{ROOT / 'scripts' / 'env'}'; exec '{sys.executable}' -c '{PRINTED}'"
    done = subprocess.run(
        [*shell, "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert {name: found.get(name) for name in ray_settings()} == ray_settings()


# Apple's own folder for data of applications, with a name of a user as long as a name may be.
FOLDERS = {
    "spaces": Path("Library", "Application Support", "my impetus"),
    "100 bytes": Path("n" * 100),
    "quotes": Path('it\'s "mine" $HOME * ; (1)'),
    "dash first": Path("-n"),
    "letters": Path("Größe 模型"),
}


@pytest.fixture(params=FOLDERS)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The scripts in a folder with such a name, beside an environment that tells what it runs."""
    folder = tmp_path / FOLDERS[request.param]
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=lambda *_: ["__pycache__"])
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "pyproject.toml").write_text("")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$PWD" "$@"\necho\n')
    python.chmod(0o755)
    shutil.copy(python, python.with_name("pip"))
    site = folder / ".venv" / "lib" / "python3.12" / "site-packages"
    (site / "ray-1.0.dist-info").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "runs"),
    [
        ("serve", ("--port", "1 2"), "-m|deployments.start.launcher|--port|1 2|"),
        ("connect", ("a b",), "-m|scripts.connect_lib|a b|"),
        ("models", ("get", "a b"), "-m|scripts.models_lib|get|a b|"),
        ("doctor", ("--steps", "a b"), "-B|-m|scripts.doctor_lib|--steps|a b|"),
        ("docs", (), "-m|scripts.generate_docs|"),
    ],
)
def test_scripts_run_from_a_folder_of_any_name(
    repository: Path, shell: Sequence[str], script: str, arguments: tuple[str, ...], runs: str
) -> None:
    done = subprocess.run(
        [*shell, str(repository / "scripts" / script), *arguments],
        cwd=repository.parent,
        env={"PATH": os.environ["PATH"], "HOME": str(repository), "CDPATH": "/"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{repository}|{runs}"
    # Set-up installed the packages once, with every path in one piece.
    assert f"{repository}|scripts/install.py|" in done.stdout or script == "doctor"
