"""The doctor's computations, each in a process of its own, with the runtimes of this machine."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from backends.gguf.batch import Batch
from catalog.scan.starters import STARTERS, installed_starter
from scripts.doctor_lib import readings
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.probes import starter
from scripts.doctor_lib.row import OK

NAMES = ["MLX, prompt and steps", "PyTorch, prompt and steps", "starter by llama.cpp"]


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_computes_what_numpy_or_the_cpu_computes(name: str) -> None:
    machine = Machine()
    if not machine.is_set_up:
        pytest.skip("there is no .venv here")
    row = readings.run_probe(machine, name, readings.COMPUTATIONS[name], 240.0)
    assert row.state == OK, row.lines()
    assert "tokens/s" in row.value
    assert "error" in row.value


def test_steps_that_compute_something_else_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed_starter(STARTERS[0])
    if found is None:
        pytest.skip("the starter model is not installed")
    add = Batch.add

    def add_another(
        self: Batch, sequence: int, start: int, token_ids: Sequence[int], *, logits: bool
    ) -> int:
        tokens = [token_ids[0] + 1] if len(token_ids) == 1 and not sequence else token_ids
        return add(self, sequence, start, tokens, logits=logits)

    monkeypatch.setattr(Batch, "add", add_another)
    problem = starter.examined(Path(found.path), starter.Size(16, 2)).problem
    assert problem.startswith("After 2 steps the logits differ from the CPU's by")
