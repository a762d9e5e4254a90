"""Forecasts of conversions, and the choices of a conversion job."""

from dataclasses import replace
from pathlib import Path

import pytest

from catalog.convert.forecast import (
    DEFAULT_BYTES_PER_S,
    Measured,
    SpeedFile,
    forecast,
    measured_kind,
)
from core.units import GIB, MIB
from tests.unit.catalog.builders import make_info

KIND = measured_kind("safetensors", "mlx")
SOURCE = replace(
    make_info("/m/model.safetensors"),
    format="safetensors",
    quantization="bf16",
    size_bytes=2 * GIB,
    parameters=GIB,
)


def test_before_the_first_conversion_a_default_speed_is_taken() -> None:
    found = forecast(SOURCE, "mlx", "4bit", 64, {})
    assert not found.is_measured
    assert found.seconds == pytest.approx(10 + 2 * GIB / DEFAULT_BYTES_PER_S, abs=0.1)
    assert found.result_bytes == GIB * 4.5 / 8
    # The result in at most 10 bits a weight, and 256 MiB to spare.
    assert found.disk_bytes == GIB * 10 // 8 + 256 * MIB
    assert found.memory_bytes > 260 * MIB


@pytest.mark.parametrize(
    ("measured", "seconds"),
    [
        ([Measured(GIB, 100.0)], 200.0),
        # Start-up is most of what a small model takes; the one nearest in size counts.
        ([Measured(128 * MIB, 100.0), Measured(4 * GIB, 100.0)], 50.0),
    ],
)
def test_what_this_machine_took_before_counts(measured: list[Measured], seconds: float) -> None:
    found = forecast(SOURCE, "mlx", "4bit", 64, {KIND: measured})
    assert (found.seconds, found.is_measured) == (seconds, True)


def test_a_far_smaller_model_and_another_kind_tell_nothing() -> None:
    tiny = {KIND: [Measured(MIB, 5.0)], "gguf>mlx": [Measured(2 * GIB, 1.0)]}
    assert forecast(SOURCE, "mlx", "4bit", 64, tiny) == forecast(SOURCE, "mlx", "4bit", 64, {})


def test_the_last_conversions_are_stored(tmp_path: Path) -> None:
    file = SpeedFile(tmp_path / "speeds.json")
    assert file.read() == {}
    for number in range(1, 11):
        file.add(KIND, Measured(GIB, float(number)))
    file.add("a>b", Measured(GIB, 1.0))
    file.add("a>b", Measured(0, 1.0))
    file.add("a>b", Measured(GIB, 0.0))
    found = SpeedFile(tmp_path / "speeds.json").read()
    assert [one.seconds for one in found[KIND]] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert found["a>b"] == (Measured(GIB, 1.0),)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}', '{"a": [{"size": 1}]}'])
def test_a_file_that_is_damaged_is_not_used(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(text)
    assert SpeedFile(path).read() == {}
