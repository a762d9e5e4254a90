"""The number of parameters that is shown counts shared weights once, and no tables."""

from pathlib import Path

import pytest

from backends.hf.fit import RuntimeFit
from backends.pytorch import backend
from backends.pytorch.backend import PytorchBackend
from backends.registry import load_backends
from tests.unit.backends.test_trainer_checkpoints import COUNT, save, weights
from tests.unit.backends.test_trainer_checkpoints import folder as folder


@pytest.mark.parametrize(("computed", "shown"), [(2 * COUNT, COUNT), (COUNT - 8, COUNT - 8)])
def test_the_smaller_of_two_counts_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, computed: int, shown: int
) -> None:
    monkeypatch.setattr(backend, "check_torch", lambda *_: RuntimeFit("", computed))
    info = load_backends()["pytorch"].identify(save(folder / "pytorch_model.bin", weights()))
    assert info.parameters == COUNT
    checked = PytorchBackend().check_runtimes(info, (), lambda _: None)
    assert checked.parameters == shown
