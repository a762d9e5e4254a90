"""The sampling that a GGUF file recommends is the default of its requests."""

from pathlib import Path
from typing import Any

import pytest

from backends.gguf.backend import recommended_sampling
from backends.gguf.file import gguf_info
from core.types import SamplingParams
from tests.gguf_raw import minimal_gguf


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"temp": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.125},
            SamplingParams(temperature=0.5, top_k=20, top_p=0.75, min_p=0.125),
        ),
        ({}, SamplingParams()),
        ({"temp": -1.0, "top_k": -1, "top_p": 1.5, "min_p": "x"}, SamplingParams()),
        ({"temp": True, "top_p": 0.0, "top_k": 0}, SamplingParams(top_k=0)),
    ],
)
def test_recommended_sampling_is_read_from_the_file(
    tmp_path: Path, keys: dict[str, Any], expected: SamplingParams
) -> None:
    metadata = {f"general.sampling.{key}": value for key, value in keys.items()}
    info = gguf_info(minimal_gguf(tmp_path / "tiny.gguf", **metadata))
    assert recommended_sampling(info) == expected
