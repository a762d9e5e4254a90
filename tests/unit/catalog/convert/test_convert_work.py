"""The choices of a conversion, from a user's wish to what is stored of its job."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.convert.graph import Conversion
from catalog.convert.work import ConversionWork, planned
from core.errors import RequestError, UnsupportedCapability
from tests.unit.catalog.builders import make_info

ID = "tiny@safetensors-f32"
INFO = replace(make_info("/m/model.safetensors"), format="safetensors", quantization="f32")


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every conversion is possible but that to Core ML."""

    def conversion(info: object, target: str) -> Conversion:
        del info
        reason = "it needs a Mac" if target == "coreml" else ""
        choices = {"mlx": ("4bit", "8bit")}.get(target, ("q4_k_m", "f16"))
        return Conversion(target, choices, reason)

    monkeypatch.setattr("catalog.convert.graph._conversion", conversion)


def work(format: str, **wish: Any) -> ConversionWork:
    return planned(ID, INFO, Path("/home/models"), format, **wish)


@pytest.mark.parametrize(
    ("wish", "folder"),
    [
        ({"format": "mlx"}, "mlx-4bit/tiny"),
        ({"format": "mlx", "quantization": "8bit"}, "mlx-8bit/tiny"),
        ({"format": "mlx", "group_size": 32}, "mlx-4bit-g32/tiny"),
        ({"format": "mlx", "group_size": 64}, "mlx-4bit/tiny"),
        ({"format": "gguf", "name": "Mine-1.5"}, "gguf-q4_k_m/Mine-1.5"),
    ],
)
def test_a_wish_becomes_a_folder_of_its_own(wish: dict[str, Any], folder: str) -> None:
    made = work(**wish)
    assert made.target == Path("/home/models") / folder
    assert ConversionWork.from_json(made.to_json()) == made


def test_the_same_result_is_the_same_whatever_it_is_called() -> None:
    assert work(format="mlx").is_same_result(work(format="mlx", quantization="4bit", name="other"))
    assert not work(format="mlx").is_same_result(work(format="mlx", group_size=128))
    assert not work(format="mlx").is_same_result(work(format="gguf"))


@pytest.mark.parametrize(
    ("wish", "error", "told"),
    [
        ({"format": "mlx", "group_size": 48}, RequestError, "supports 32, 64 and 128"),
        ({"format": "gguf", "group_size": 64}, RequestError, "a choice of MLX alone"),
        ({"format": "zip"}, UnsupportedCapability, "not a target format"),
        ({"format": "mlx", "quantization": "q8_0"}, UnsupportedCapability, "not one of 4bit, 8bit"),
        ({"format": "coreml"}, UnsupportedCapability, "it needs a Mac"),
        *(
            ({"format": "mlx", "name": name}, RequestError, "is not a name for a converted model")
            for name in ("../up", "a/b", ".hidden", "a\\b", "x" * 97, "a\n", "é")
        ),
    ],
)
def test_choices_that_do_not_exist_are_refused(
    wish: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        work(**wish)
