"""The stand-in for coremltools, in the processes of Core ML models."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.process_memory import model_processes
from tests.coreml_stand_in.install import StandIn, new_stand_in, replacements


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Core ML models run as on macOS, with the stand-in; their processes must all end."""
    found = new_stand_in(tmp_path / "stand-in")
    for module, name, value in replacements(found.folder):
        monkeypatch.setattr(module, name, value)
    before = model_processes()
    yield found
    assert model_processes() == before
