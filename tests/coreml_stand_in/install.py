"""Puts the stand-in for coremltools into the processes of Core ML models, which run as on macOS."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from backends.coreml import process, runtime

_SOURCE = Path(__file__).with_name("coremltools.py")


@dataclass(frozen=True)
class StandIn:
    """A folder with the module, what its calls do, and what was called."""

    folder: Path

    def set(self, **behaviour: Any) -> None:
        """Say what calls do from now on; see the module."""
        scratch = self.folder / "behaviour.new"
        scratch.write_text(json.dumps(behaviour))
        scratch.replace(self.folder / "behaviour.json")

    def calls(self, name: str = "", what: str = "end") -> list[dict[str, Any]]:
        """Return the calls with a name, or all, that have ended, or begun."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [one for one in found if one["what"] == what and name in ("", one["call"])]

    def spans(self, name: str) -> list[tuple[float, float]]:
        """Return when each call with a name began and ended, by `time.monotonic`."""
        begun = [one["at"] for one in self.calls(name, "begin")]
        ended = [one["at"] for one in self.calls(name)]
        return list(zip(begun, ended, strict=True))


def new_stand_in(folder: Path) -> StandIn:
    """Make `folder`, with the stand-in in it, whose calls return at once."""
    folder.mkdir()
    shutil.copy(_SOURCE, folder)
    found = StandIn(folder)
    found.set()
    return found


def replacements(folder: Path) -> list[tuple[ModuleType, str, Any]]:
    """Return the attributes of modules to replace: module, name, value.

    Core ML models that are opened then run as on macOS, with the stand-in in `folder`.
    """
    *command, code = process._COMMAND
    first = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.dont_write_bytecode = True; "
    # The worker puts the code's folder before it, which has no such module.
    return [
        (process, "_COMMAND", [*command, first + code]),
        (runtime, "sys", SimpleNamespace(platform="darwin")),
    ]
