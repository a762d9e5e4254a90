"""Tests of scripts/find_python, system_problem and setup with a tree of fake Macs and Pythons."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from scripts.install import ROOT
from tests.shell_programs.programs import POSIX_SHELLS, shell_command, write_program

# What scripts may start besides the fakes; Apple's tools are not among them.
TOOLS = ("ls", "cat", "cksum", "cut", "grep", "dirname", "mkdir", "chmod", "cp")


@pytest.fixture(params=POSIX_SHELLS)
def shell(request: pytest.FixtureRequest) -> Sequence[str]:
    """A POSIX shell; skips the test where it is not installed."""
    return shell_command(*POSIX_SHELLS[request.param])


class FakeSystem:
    """A folder with `bin` for PATH, a home with a space in its name, and the absolute folders."""

    def __init__(self, folder: Path, shell: Sequence[str]) -> None:
        self.root = folder / "root"
        self.home = folder / "home of mine"
        self.bin = folder / "bin"
        self.opened = folder / "dialogue"
        self.shell = shell
        for name in TOOLS:
            tool = shutil.which(name)
            assert tool
            self.bin.mkdir(exist_ok=True)
            (self.bin / name).symlink_to(tool)
        self.mac()

    def mac(
        self,
        release: str = "24.6.0",
        *,
        arm: str = "1",
        translated: str = "0",
        tools: Path | None = None,
    ) -> None:
        write_program(
            self.bin / "uname", f'case $1 in -s) echo Darwin ;; -r) echo "{release}" ;; esac'
        )
        write_program(
            self.bin / "sysctl",
            "case $2 in",
            f"  sysctl.proc_translated) echo {translated} ;;",
            f"  hw.optional.arm64) echo {arm} ;;",
            "  machdep.cpu.brand_string) echo 'Apple M3' ;;",
            "  *) exit 1 ;;",
            "esac",
        )
        write_program(self.bin / "xcode-select", f"echo '{tools}'" if tools else "exit 2")

    def shim(self, name: str) -> None:
        """Make one of Apple's programs that only open a dialogue without the tools."""
        write_program(self.root / "usr" / "bin" / name, f"echo {name} >>'{self.opened}'", "exit 1")

    def run(
        self, script: str = "find_python", *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.shell, str(ROOT / "scripts" / script), *arguments],
            env={
                "PATH": f"{self.bin}{os.pathsep}{self.root / 'usr' / 'bin'}",
                "HOME": str(self.home),
                "FIND_PYTHON_ROOT": str(self.root),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )


def python(path: Path, version: str, machine: str = "arm64", missing: str = "") -> Path:
    return write_program(path, f"echo '{version} {machine} {missing}'")


@pytest.fixture
def system(tmp_path: Path, shell: Sequence[str]) -> FakeSystem:
    return FakeSystem(tmp_path, shell)


PLACES: dict[str, Callable[[FakeSystem], Path]] = {
    "Homebrew": lambda s: s.root / "opt/homebrew/opt/python@3.12/bin/python3.12",
    "python.org": lambda s: (
        s.root / "Library/Frameworks/Python.framework/Versions/3.13/bin/python3.13"
    ),
    "MacPorts": lambda s: s.root / "opt/local/bin/python3.11",
    "pyenv": lambda s: s.home / ".pyenv/versions/3.12.11/bin/python3",
    "uv": lambda s: s.home / ".local/share/uv/python/cpython-3.12.9-macos-aarch64-none/bin/python3",
    "usr-local": lambda s: s.root / "usr/local/bin/python3.12",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_python_that_is_not_on_the_path_is_found(system: FakeSystem, place: str) -> None:
    path = PLACES[place](system)
    version = next(part for part in ("3.13", "3.11", "3.12") if part in str(path))
    python(path, version)
    python(system.bin / "python3", "3.14")
    done = system.run()
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr


def test_apples_dialogue_is_never_opened(system: FakeSystem) -> None:
    for name in ("python3", "git", "cc", "c++", "clang"):
        system.shim(name)
    done = system.run()
    assert done.returncode == 1
    assert "needs Apple's command line tools (xcode-select --install)" in done.stderr
    assert not system.opened.exists()
    assert system.run("system_problem").returncode == 0
    assert not system.opened.exists()


def test_the_shim_counts_once_the_tools_are_there(system: FakeSystem, tmp_path: Path) -> None:
    system.mac(tools=tmp_path)
    python(system.root / "usr/bin/python3", "3.9")
    assert "python3 is Python 3.9." in system.run().stderr


def test_tools_that_were_removed_count_as_missing(system: FakeSystem, tmp_path: Path) -> None:
    system.mac(tools=tmp_path / "Xcode-removed.app")
    system.shim("python3")
    assert system.run().returncode == 1
    assert not system.opened.exists()


def test_a_later_one_on_the_path_is_found_behind_an_unsuitable_one(
    system: FakeSystem, tmp_path: Path
) -> None:
    python(system.bin / "python3", "3.14")
    other = python(tmp_path / "other bin" / "python3", "3.13")
    path = f"{system.bin}{os.pathsep}{other.parent}"
    assert system.run(PATH=path).stdout == f"{other}\n"


def test_python_3_14_alone_is_explained(system: FakeSystem) -> None:
    write_program(system.root / "opt/homebrew/bin/brew")
    python(system.bin / "python3", "3.14")
    done = system.run()
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13;" in done.stderr
    assert f"{system.bin}/python3 is Python 3.14. Run: brew install python@3.12" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_homebrew_python_org_is_named(system: FakeSystem) -> None:
    assert "Install Python 3.12 for macOS from python.org" in system.run().stderr


@pytest.mark.parametrize(
    ("machine", "missing", "reason"),
    [
        ("x86_64", "", "is built for x86_64, not for Apple silicon."),
        ("arm64", "ssl,sqlite3", "lacks ssl,sqlite3."),
    ],
)
def test_a_python_that_cannot_run_the_packages_is_passed_over(
    system: FakeSystem, machine: str, missing: str, reason: str
) -> None:
    python(system.bin / "python3.12", "3.12", machine, missing)
    assert reason in system.run().stderr
    fit = python(system.bin / "python3.11", "3.11")
    assert system.run().stdout == f"{fit}\n"


def test_a_named_python_may_have_a_space_and_is_the_only_one(system: FakeSystem) -> None:
    python(system.bin / "python3.12", "3.12")
    named = python(system.home / "a b" / "python3", "3.13")
    assert system.run(PYTHON=str(named)).stdout == f"{named}\n"
    old = python(system.home / "a b" / "old", "3.9")
    done = system.run(PYTHON=str(old))
    assert done.returncode == 1
    assert f"PYTHON={old} cannot be used: {old} is Python 3.9." in done.stderr
    assert "there is no such program" in system.run(PYTHON="nothing").stderr


def test_any_accepts_an_old_python_for_the_doctor(system: FakeSystem) -> None:
    old = python(system.bin / "python3", "3.9", missing="ensurepip")
    assert system.run("find_python", "--any").stdout == f"{old}\n"
    python(system.bin / "python3", "3.8")
    assert system.run("find_python", "--any").returncode == 1


def test_list_has_every_python_with_its_problem(system: FakeSystem) -> None:
    fit = python(system.bin / "python3.12", "3.12")
    new = python(system.bin / "python3", "3.14")
    broken = write_program(system.bin / "python3.11", "exit 1")
    done = system.run("find_python", "--list")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"{fit}\t3.12\tarm64\t",
        f"{broken}\t\t\tdoes not start",
        f"{new}\t3.14\tarm64\tis Python 3.14",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"translated": "1"}, "This terminal runs under Rosetta"),
        ({"arm": "0"}, "this Mac has an Intel processor."),
        ({"release": "22.6.0"}, "needs macOS 14 or later; this Mac runs macOS 13."),
        ({"release": "19.6.0"}, "this Mac runs macOS 10.15 or earlier."),
        ({"release": "23.0.0"}, ""),
        ({"release": "25.1.0"}, ""),
    ],
    ids=["Rosetta", "Intel", "macOS 13", "macOS 10.15", "macOS 14", "macOS 26"],
)
def test_a_system_that_cannot_run_the_server_gets_one_sentence(
    system: FakeSystem, changes: dict[str, str], sentence: str
) -> None:
    system.mac(**changes)  # type: ignore[arg-type]
    done = system.run("system_problem")
    assert done.returncode == (1 if sentence else 0)
    assert sentence in done.stdout
    assert done.stdout.count("\n") == (1 if sentence else 0)


class FakeRepository:
    """The real scripts with a Python that records what setup makes it install."""

    def __init__(self, system: FakeSystem, folder: Path) -> None:
        self.system = system
        self.folder = folder / "a repository"
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("setup", "find_python", "system_problem", "constraints.txt", "install.py"):
            shutil.copy(ROOT / "scripts" / name, self.folder / "scripts" / name)
        (self.folder / "pyproject.toml").write_text("")
        self.log = folder / "installed"
        write_program(
            system.bin / "python3.12",
            "case $1 in",
            "  -c) echo '3.12 arm64 ' ;;",
            "  --version) echo 'Python 3.12.1' ;;",
            '  -m) mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;',
            f"  *) shift; echo \"install $*\" >>'{self.log}'",
            "     mkdir -p .venv/lib/python3.12/site-packages/ray-2.60.0.dist-info ;;",
            "esac",
        )
        write_program(system.bin / "sh", f'exec {" ".join(system.shell)} "$@"')

    def setup(self, *extras: str) -> tuple[int, str, list[str]]:
        """Run scripts/setup; return its code, its errors and what it installed."""
        self.log.write_text("")
        done = subprocess.run(
            [*self.system.shell, str(self.folder / "scripts" / "setup"), *extras],
            env={"PATH": str(self.system.bin), "HOME": str(self.system.home)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def repository(system: FakeSystem, tmp_path: Path) -> FakeRepository:
    return FakeRepository(system, tmp_path)


def make_xcode(folder: Path, version: str) -> Path:
    developer = folder / "Xcode.app" / "Contents" / "Developer"
    developer.mkdir(parents=True, exist_ok=True)
    (developer.parent / "version.plist").write_text(version)
    return developer


def test_setup_does_nothing_when_nothing_changed(repository: FakeRepository) -> None:
    assert repository.setup("torch") == (0, "", ["install torch"])
    assert repository.setup("torch") == (0, "", [])
    assert repository.setup() == (0, "", [])
    assert repository.setup("apple") == (0, "", ["install apple"])


def test_setup_installs_again_what_was_removed(repository: FakeRepository) -> None:
    assert repository.setup() == (0, "", ["install "])
    site = repository.folder / ".venv" / "lib" / "python3.12" / "site-packages"
    (site / "of_the_user-1.0.dist-info").mkdir()
    assert repository.setup() == (0, "", [])
    (site / "ray-2.60.0.dist-info").rename(site / "ray-2.59.0.dist-info")
    assert repository.setup() == (0, "", ["install "])


def test_setup_refuses_a_mac_that_cannot_run_the_server(repository: FakeRepository) -> None:
    repository.system.mac(translated="1")
    code, errors, installed = repository.setup()
    assert (code, installed) == (1, [])
    assert "Rosetta" in errors


def test_setup_notices_xcode_later_and_tries_once_for_each(
    repository: FakeRepository, tmp_path: Path
) -> None:
    repository.system.mac("25.1.0")
    assert repository.setup() == (0, "", ["install "])
    xcode = make_xcode(tmp_path, "26.0")
    repository.system.mac("25.1.0", tools=xcode)
    assert repository.setup() == (0, "", ["install --apple-sdk"])
    assert repository.setup() == (0, "", [])
    make_xcode(tmp_path, "26.1")
    assert repository.setup() == (0, "", ["install --apple-sdk"])


def test_setup_does_not_try_the_sdk_before_macos_26(
    repository: FakeRepository, tmp_path: Path
) -> None:
    repository.system.mac("24.6.0", tools=make_xcode(tmp_path, "26.0"))
    assert repository.setup() == (0, "", ["install "])


def test_setup_installs_again_after_an_update_of_macos(repository: FakeRepository) -> None:
    assert repository.setup() == (0, "", ["install "])
    repository.system.mac("25.0.0")
    assert repository.setup() == (0, "", ["install "])
    repository.system.mac("25.3.0")
    assert repository.setup() == (0, "", [])
