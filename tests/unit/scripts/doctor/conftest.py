"""A healthy Mac and its installation, made of fake programs, in which tests plant faults."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from scripts.doctor_lib.__main__ import STEPS, checked
from scripts.doctor_lib.machine import ROOT, Machine
from scripts.doctor_lib.packages import pinned
from scripts.doctor_lib.row import Row
from tests.shell_programs.programs import write_program

LOCAL_STEPS = [step for step in STEPS if step != "server"]
TAG = "Tag: py3-none-macosx_{}_0_arm64\n"
PMSET = "System-wide power settings:\nCurrently in use:\n standby 1\n lowpowermode         0\n"
BATTERY = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t83%; charging; present: true\n"


class Plant:
    """A Mac with macOS 15 that is set up and healthy; methods and attributes plant faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.root = folder / "repository"
        self.top = folder / "top"
        self.home = folder / "home"
        self.opened = folder / "dialogue"
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "IMPETUS_PORT": "1",
            "FIND_PYTHON_ROOT": str(self.top),
        }
        self.free_bytes = 100 * 2**30
        self.values = {
            "sysctl.proc_translated": "0",
            "hw.optional.arm64": "1",
            "hw.memsize": str(16 * 2**30),
            "hw.model": "Mac15,3",
            "hw.perflevel0.physicalcpu": "4",
            "hw.perflevel1.physicalcpu": "4",
            "machdep.cpu.brand_string": "Apple M3",
            "kern.memorystatus_vm_pressure_level": "1",
            "kern.maxfilesperproc": "61440",
            "iogpu.wired_limit_mb": "0",
        }
        for name in ("home", "top"):
            (folder / name).mkdir()
        (self.root / "scripts").mkdir(parents=True)
        for name in ("find_python", "system_problem", "constraints.txt"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts" / name)
        self.program("uname", "case $1 in -s) echo Darwin ;; *) echo 24.6.0 ;; esac")
        self.program("sw_vers", "case $1 in *build*) echo 24G90 ;; *) echo 15.6.1 ;; esac")
        self.mounted("apfs, local, journaled, nobrowse")
        self.firewall("Firewall is disabled. (State = 0)")
        self.program("xcode-select", f"echo '{self.folder}'")
        self.compiler("echo 'Apple M3, working set 12124 MiB'")
        self.program("sandbox-exec", "exit 0")
        self.program("notifyutil", "echo com.apple.system.thermalpressurelevel 0")
        self.program("scutil", "exit 1")
        self.program("xcrun", "echo 15.5")
        self.pmset(PMSET, BATTERY)
        self.program("python3.12", "echo '3.12 arm64 '")
        self.set_up()

    def program(self, name: str, *lines: str) -> None:
        """Put a program on PATH."""
        write_program(self.bin / name, *lines)

    def compiler(self, *lines: str) -> None:
        """Put a C++ compiler on PATH whose programs consist of `lines`."""
        made = write_program(self.folder / "compiled", *lines)
        copy = 'while [ "$1" != -o ]; do shift; done; cp "$0.out" "$2"'
        self.program("c++", copy)
        shutil.copy(made, self.bin / "c++.out")

    def pmset(self, settings: str, battery: str) -> None:
        """Let pmset answer."""
        (self.folder / "settings").write_text(settings)
        (self.folder / "battery").write_text(battery)
        names = f"'{self.folder}/battery'", f"'{self.folder}/settings'"
        self.program("pmset", f"if [ $# = 2 ]; then cat {names[0]}; else cat {names[1]}; fi")

    def mounted(self, options: str) -> None:
        """Let df and mount tell the user's file system, on a volume with a space in its name."""
        point, disk = "/Volumes/My Data", "/dev/disk3s5"
        head = "Filesystem 512-blocks Used Available Capacity Mounted on"
        self.program("df", f"echo '{head}'", f"echo '{disk} 1942700360 4 1 1% {point}'")
        root = "/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)"
        self.program("mount", f"echo '{root}'", f"echo '{disk} on {point} ({options})'")

    def firewall(self, told: str) -> None:
        """Let macOS' firewall tell its state."""
        folder = self.top / "usr" / "libexec" / "ApplicationFirewall"
        write_program(folder / "socketfilterfw", f"[ $1 = --getglobalstate ] && echo '{told}'")

    def set_up(self, *cases: str, versions: dict[str, str] | None = None, tag: str = "15") -> None:
        """Make the virtual environment; `cases` are the first of its Python's `case`."""
        self.python = self.root / ".venv" / "bin" / "python"
        installed = {
            "versions": versions or {"numpy": self.pins()["numpy"]},
            "wheel": TAG.format(tag),
        }
        (self.folder / "installed.json").write_text(json.dumps(installed))
        result = json.dumps({"value": "fine", "problem": "", "cure": "", "state": "FAIL"})
        write_program(
            self.python,
            'case "$*" in',
            *cases,
            f"  *metadata.distributions*) cat '{self.folder}/installed.json' ;;",
            f"  *doctor_lib.*) echo '{result}' ;;",
            "  *) echo 1.0 ;;",
            "esac",
        )
        (self.root / ".venv" / "installed-runtime").write_text("")

    def unset(self) -> None:
        """Remove the virtual environment, as before the first set-up."""
        shutil.rmtree(self.root / ".venv")

    def pins(self) -> dict[str, str]:
        """Return the pinned versions."""
        return pinned((ROOT / "scripts" / "constraints.txt").read_text(), "darwin")

    def machine(self, system: str = "darwin") -> Machine:
        """Return the machine as planted."""
        cases = (f"  {name}) echo '{value}' ;;" for name, value in self.values.items())
        self.program("sysctl", "case $2 in", *cases, "  *) exit 1 ;;", "esac")
        free = self.free_bytes

        class Planted(Machine):
            def free_bytes(self, folder: Path) -> int:
                del folder
                return free

        return Planted(self.environment, system=system, root=self.root, top=self.top)

    def shims(self) -> None:
        """Remove Apple's tools; what is left of them opens a dialogue."""
        self.program("xcode-select", "exit 2")
        for name in ("c++", "cc", "git", "python3", "xcodebuild", "xcrun"):
            self.program(name, f"echo {name} >>'{self.opened}'", "exit 1")
        shim = self.top / "usr" / "bin" / "python3"
        shim.parent.mkdir(parents=True)
        shim.hardlink_to(self.bin / "python3")


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """A healthy Mac."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Plant(tmp_path)


def find(rows: Iterator[Row] | Sequence[Row], what: str) -> Row:
    """Return the row of this name."""
    found = {row.what: row for row in rows}
    return found[what]


def examine(plant: Plant, *steps: str, on: str = "darwin") -> list[Row]:
    """Return the rows of these steps, or of all but the server's."""
    machine = plant.machine(on)
    return [row for step in steps or LOCAL_STEPS for row in checked(STEPS[step], machine)]
