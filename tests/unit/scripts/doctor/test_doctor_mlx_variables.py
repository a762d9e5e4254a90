"""The doctor's comparison of MLX' variables: what it measures, in which processes, and its row."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from core.settings import Settings
from deployments.start.environment import environment
from scripts.doctor_lib.probes import mlx_variables
from scripts.doctor_lib.probes.mlx_variables import SETTINGS, compare, measure, measure_in_process
from scripts.doctor_lib.row import WARN


def test_each_variable_is_compared_with_none() -> None:
    speeds = {"": 100.0, "MLX_METAL_FAST_SYNCH": 131.0, "MLX_MAX_OPS_PER_BUFFER": 97.0}
    found = compare(lambda values: (speeds["".join(values)], 5.0))
    assert found.value == (
        "100 steps/s; MLX_METAL_FAST_SYNCH=1 +31%; MLX_MAX_OPS_PER_BUFFER=100 -3%; "
        "MLX_MAX_OPS_PER_BUFFER=2000 -3%"
    )
    assert not found.problem


@pytest.mark.parametrize("result", [5.1, float("nan")])
def test_a_variable_that_changes_results_is_a_warning(result: float) -> None:
    found = compare(lambda values: (100.0, result if "MLX_METAL_FAST_SYNCH" in values else 5.0))
    assert found.problem == "With MLX_METAL_FAST_SYNCH=1 MLX computes something else."
    assert found.state == WARN


def test_a_variable_with_which_mlx_ends_is_told_and_the_others_are_measured() -> None:
    def fails(values: Mapping[str, str]) -> tuple[float, float]:
        if "MLX_METAL_FAST_SYNCH" in values:
            raise subprocess.CalledProcessError(-6, ["python"])
        return 100.0, 5.0

    found = compare(fails)
    assert "MLX_METAL_FAST_SYNCH=1 fails; MLX_MAX_OPS_PER_BUFFER=100 +0%" in found.value
    assert not found.problem


def test_mlx_that_always_fails_is_a_warning() -> None:
    def fails(_: Mapping[str, str]) -> tuple[float, float]:
        raise subprocess.TimeoutExpired(["python"], 45.0)

    found = compare(fails)
    assert found.value == "no variable fails"
    assert found.problem.startswith("MLX fails: ")


def test_a_process_has_its_variables_and_none_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "[$MLX_MAX_OPS_PER_BUFFER, 0${MLX_METAL_FAST_SYNCH}.5]"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "1")
    assert measure_in_process(SETTINGS[2]) == (100.0, 0.5)
    assert measure_in_process(SETTINGS[3]) == (2000.0, 0.5)
    python.write_text("#!/bin/sh\nexit 3\n")
    assert compare().problem.startswith("MLX fails: ")


def test_a_step_computes_and_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")
    for name, value in (("_LAYERS", 2), ("_WIDTH", 128), ("_STEPS", 3), ("_WARM_STEPS", 1)):
        monkeypatch.setattr(mlx_variables, name, value)
    speed, result = measure()
    assert speed > 0
    assert result > 0
    assert measure()[1] == pytest.approx(result, rel=1e-6)


def test_what_a_user_exports_reaches_the_servers_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "1")
    assert environment(Settings(home=tmp_path))["MLX_METAL_FAST_SYNCH"] == "1"


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Metal is on macOS only")
def test_this_mac_measures_every_variable() -> None:
    found: Any = compare()
    assert "fails" not in found.value
    assert not found.problem
