"""What the checks see of the machine; tests give them another one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from scripts.doctor_lib.child import Ran, run

ROOT = Path(__file__).resolve().parents[2]
# Apple's and the administrator's folders; a service's PATH may lack them.
_SYSTEM_FOLDERS = ("/usr/bin", "/bin", "/usr/sbin", "/sbin")

# The first start on a Mac is checked by the system for malware.
_START_LIMIT_S = 60.0


class Machine:
    """This machine: its system, environment, folders and commands.

    `top` is put before absolute folders that are read, so that tests can bring a tree.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        system: str = sys.platform,
        root: Path = ROOT,
        top: Path = Path("/"),
    ) -> None:
        given = dict(os.environ if environment is None else environment)
        folders = [given.get("PATH", ""), *_SYSTEM_FOLDERS]
        given["PATH"] = os.pathsep.join(filter(None, folders))
        # Translated messages cannot be parsed, and nothing may be left beside the sources.
        given.update(LC_ALL="C", PYTHONDONTWRITEBYTECODE="1")
        # ONNX Runtime keeps an identifier and a database in the user's cache when it is imported.
        given.update(ORT_DISABLE_TELEMETRY="1")
        self.environment: Mapping[str, str] = given
        self.system = system
        self.root = root
        self.top = top
        # Whether the user has agreed to let the machine sleep during the step `server`.
        self.may_sleep = False

    @property
    def is_mac(self) -> bool:
        """Whether this is macOS."""
        return self.system == "darwin"

    @property
    def home(self) -> Path:
        """The user's folder."""
        return Path(self.environment.get("HOME") or os.path.expanduser("~"))

    @property
    def python(self) -> Path:
        """The Python of the virtual environment; it may not exist."""
        return self.root / ".venv" / "bin" / "python"

    @property
    def is_set_up(self) -> bool:
        """Whether `scripts/setup` has made the virtual environment, complete, usable or not."""
        # Its Python is a link, which may lead nowhere after an update of Homebrew.
        return os.path.lexists(self.python)

    @cached_property
    def lacks_python(self) -> str:
        """Why nothing can be run in the virtual environment; empty if it can.  Blocks once."""
        if not self.is_set_up:
            return "scripts/setup has not run yet"
        done = self.run(str(self.python), "-c", "import ctypes", limit_s=_START_LIMIT_S)
        return done.ended and "the Python of .venv does not start"

    @property
    def data_folder(self) -> Path:
        """IMPETUS_HOME, or its default as platformdirs has it."""
        if named := self.environment.get("IMPETUS_HOME"):
            return Path(named).expanduser()
        if self.is_mac:
            return self.home / "Library" / "Application Support" / "impetus"
        return Path(self.environment.get("XDG_DATA_HOME") or self.home / ".local/share") / "impetus"

    @property
    def temporary(self) -> Path:
        """Where Ray puts its sockets."""
        return Path(self.environment.get("RAY_TMPDIR") or "/tmp")

    def run(
        self,
        *command: str,
        limit_s: float = 10.0,
        extra: Mapping[str, str] | None = None,
        most_bytes: int = 73_728,
    ) -> Ran:
        """Run a command of this machine, found on PATH, in the repository's folder; blocks.

        Output over `most_bytes` is cut in the middle.
        """
        environment = {**self.environment, **(extra or {})}
        program = shutil.which(command[0], path=environment["PATH"]) or command[0]
        return run([program, *command[1:]], limit_s, environment, str(self.root), most_bytes)

    def run_python(self, *arguments: str, limit_s: float) -> Ran:
        """Run the virtual environment's Python with a temporary folder of its own; blocks.

        What a killed process, or Core ML, leaves in that folder is removed.
        """
        folder = tempfile.mkdtemp(prefix="impetus-doctor-")
        try:
            extra = {**self._server_settings(), "TMPDIR": folder}
            return self.run(str(self.python), "-B", *arguments, limit_s=limit_s, extra=extra)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _server_settings(self) -> dict[str, str]:
        """Return what scripts/env sets for libraries and the user does not, without Ray's."""
        try:
            lines = (self.root / "scripts" / "env").read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        pairs = (
            line.strip().partition("=") for line in lines if not line.startswith(("#", "RAY_"))
        )
        return {name: value for name, mark, value in pairs if mark and name not in self.environment}

    def sysctl(self, name: str) -> str:
        """Return a value of macOS' kernel; empty if it has none of that name."""
        done = self.run("sysctl", "-n", name)
        return done.text if done.code == 0 else ""

    def free_bytes(self, folder: Path) -> int:
        """Return the bytes that this user may still write where `folder` is, or would be."""
        return shutil.disk_usage(existing(folder)).free

    def memory_bytes(self) -> int:
        """Return the machine's RAM; 0 if the system does not tell."""
        if self.is_mac:
            text = self.sysctl("hw.memsize")
            return int(text) if text.isdigit() else 0
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return 0


def existing(path: Path) -> Path:
    """Return `path`, or the nearest one above it that exists and can be seen."""
    # Unlike Path.exists it raises nothing below a folder that may not be entered.
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
