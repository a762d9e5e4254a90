"""What the catalog says of a converted model: its source, the choices, the measured quality."""

import json
from pathlib import Path
from typing import Any

import pytest

from catalog.encoding import source_from_json
from catalog.models import Converted
from catalog.scan.provenance import Provenance, provenance_of
from core.types import JsonValue

PARAMETERS = {
    "model_id": "m@safetensors-bf16",
    "target_format": "mlx",
    "formats": ["safetensors", "mlx"],
    "quantization": "4bit",
    "group_size": 32,
    "exporter": None,
    "context_tokens": None,
}
CHOICES: dict[str, JsonValue] = {"target_format": "mlx", "quantization": "4bit", "group_size": 32}


def read(root: Path, content: Any) -> Provenance | None:
    """Return what is read of a model in a folder with this provenance.json."""
    folder = root / "mlx-4bit" / "m"
    folder.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "provenance.json").write_text(text)
    return provenance_of(folder / "model.safetensors", root)


def test_choices_and_quality_are_read(tmp_path: Path) -> None:
    quality = {"tokens": 512, "kl_mean": 0.01, "kl_p99": None, "reason": ""}
    found = read(tmp_path, {"parameters": PARAMETERS, "quality": quality})
    figures: dict[str, JsonValue] = {"tokens": 512, "kl_mean": 0.01, "reason": ""}
    assert found == Provenance("m@safetensors-bf16", CHOICES, figures)


def test_a_conversion_without_a_measurement_has_none(tmp_path: Path) -> None:
    found = read(tmp_path, {"parameters": PARAMETERS, "quality": None})
    assert found == Provenance("m@safetensors-bf16", CHOICES)
    assert provenance_of(tmp_path / "other" / "model.gguf", tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 10_000,
        [],
        {"parameters": []},
        {"parameters": {"model_id": 5}},
        {"parameters": {"model_id": ""}},
    ],
)
def test_other_content_makes_an_original(tmp_path: Path, content: Any) -> None:
    assert read(tmp_path, content) is None


def test_what_somebody_else_wrote_is_bounded(tmp_path: Path) -> None:
    strange = {**PARAMETERS, "quantization": "q" * 9000, "group_size": {"a": 1}}
    found = read(tmp_path, {"parameters": strange, "quality": {str(n): n for n in range(1000)}})
    assert found is not None
    assert found.choices == {"target_format": "mlx", "quantization": "q" * 400}
    assert len(found.quality) == 32


def test_rows_of_an_older_catalog_are_read() -> None:
    row = '{"kind": "converted", "model_id": "m", "root": "/a"}'
    assert source_from_json(row) == Converted("/a", "m")
