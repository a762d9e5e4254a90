"""Client libraries, each run as a script of its own by the Python or Node.js that has it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.agents import run_command

SCRIPTS = Path(__file__).parent / "clients"


@dataclass(frozen=True, slots=True)
class Sdk:
    """A script with the program that runs it; every run is a new process in `folder`."""

    program: Path
    script: Path
    home: Path
    folder: Path
    base_url: str

    def run(self, model: str, *phase: str, task: str) -> dict[str, Any]:
        """Run one phase of the script; return the JSON of its last line."""
        state = self.home.parent / "state"
        command = (
            *(str(self.program), str(self.script), self.base_url, model),
            *phase,
            *(str(state), task),
        )
        done = run_command(command, self.folder, self.home)
        assert done.code == 0, done.errors[-6000:]
        result: dict[str, Any] = done.events[-1]
        return result


def beside_packages(script: Path, node_modules: Path, folder: Path) -> Path:
    """Copy a module to where Node.js finds its packages, without writing into their folder."""
    folder.mkdir()
    (folder / "node_modules").symlink_to(node_modules)
    return Path(shutil.copy(script, folder))
