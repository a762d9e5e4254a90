"""The stand-in for coremltools, in the processes of Core ML models."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.coreml import process
from core.process_memory import model_processes

SOURCE = Path(__file__).resolve().parents[3] / "coreml_stand_in" / "coremltools.py"


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


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Core ML models run as on macOS, with the stand-in; their processes must all end."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    shutil.copy(SOURCE, folder)
    *command, code = process._COMMAND
    first = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.dont_write_bytecode = True; "
    # The worker puts the code's folder before it, which has no such module.
    monkeypatch.setattr(process, "_COMMAND", [*command, first + code])
    monkeypatch.setattr("backends.coreml.runtime.sys", SimpleNamespace(platform="darwin"))
    found = StandIn(folder)
    found.set()
    before = model_processes()
    yield found
    assert model_processes() == before
