"""Tests of the table of architectures, and that it names every model of the zoo."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from scripts import generate_docs
from scripts.architecture_table import END, START, architecture_table, with_architectures
from tests.contract.zoo.architectures import ARCHITECTURES
from tests.contract.zoo.expectations import KNOWN_FAULTS, REFUSED


def entry(model_type: str, variant: str = "", **runtimes: str) -> Mapping[str, Any]:
    return {
        "model_type": model_type,
        "variant": variant,
        **{layout: {"runtime": runtime} for layout, runtime in runtimes.items()},
    }


def rows(*models: Mapping[str, Any]) -> list[str]:
    return architecture_table(models).splitlines()[2:]


def test_each_type_has_a_row_in_order() -> None:
    assert rows(
        entry("qwen2", safetensors="mlx", bin="pytorch"),
        entry("bloom", safetensors="pytorch", bin="pytorch"),
    ) == ["| `bloom` | PyTorch | PyTorch |", "| `qwen2` | MLX | PyTorch |"]


def test_a_variant_has_a_row_only_if_it_differs() -> None:
    assert rows(
        entry("llama", "YaRN", safetensors="mlx", bin="pytorch"),
        entry("llama", safetensors="mlx", bin="pytorch"),
        entry("llama", "sliding window", safetensors="pytorch", bin="pytorch"),
    ) == ["| `llama` | MLX | PyTorch |", "| `llama`, sliding window | PyTorch | PyTorch |"]


def test_reasons_and_faults_are_shown_in_one_cell() -> None:
    reason = "The model of x.bin cannot be used: it is a | voice\n model; this server runs others."
    refused = {"runtime": "refused", "reason": reason}
    broken = {"runtime": "mlx", "fault": "other text"}
    found = rows({"model_type": "x", "variant": "", "safetensors": refused, "bin": broken})
    assert found == ["| `x` | refused: it is a / voice model | does not work yet: other text |"]


@pytest.mark.parametrize("why", ["", ": other logits (by 12%)", " (other logits)"])
def test_limits_are_shown_without_their_reason(why: str) -> None:
    limited = {"runtime": "pytorch", "limits": f"computes one request at a time{why}."}
    found = rows({"model_type": "x", "variant": "", "safetensors": limited, "bin": limited})
    assert found == ["| `x`" + " | PyTorch; computes one request at a time" * 2 + " |"]


def test_only_what_is_between_the_markers_changes() -> None:
    page = f"before\n{START}old\n{END}after\n"
    assert with_architectures(page, {}) == f"before\n{START}{architecture_table([])}{END}after\n"
    with pytest.raises(ValueError, match="has no lines"):
        with_architectures("before\nafter\n", {})


def test_the_recorded_run_is_of_the_whole_zoo() -> None:
    recorded = json.loads(generate_docs.ARCHITECTURES.read_text())
    assert set(recorded) == set(ARCHITECTURES)
    faults = {}
    for name, model in recorded.items():
        for layout in ("safetensors", "bin"):
            outcome = model[layout]
            assert (outcome["runtime"] == "refused") == ((name, layout) in REFUSED), name
            if "fault" in outcome:
                faults[name, layout] = outcome["fault"]
    assert faults == KNOWN_FAULTS
