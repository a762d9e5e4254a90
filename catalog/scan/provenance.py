"""Reads from provenance.json which model a folder was converted from, and how."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catalog.models import PROVENANCE
from core.files import passing_cause
from core.types import JsonValue

_MAX_BYTES = 1024 * 1024
_LONGEST_ID = 200
_LONGEST_TEXT = 400
# What a user may choose of a conversion, by the names in provenance.json.
_CHOICES = ("target_format", "quantization", "group_size", "exporter", "context_tokens")
_MOST_FIGURES = 32


@dataclass(frozen=True, slots=True)
class Provenance:
    """The source of a converted model, the choices, and the quality that was measured, if any."""

    model_id: str
    choices: Mapping[str, JsonValue] = field(default_factory=dict)
    quality: Mapping[str, JsonValue] = field(default_factory=dict)


def provenance_of(weights: Path, root: Path) -> Provenance | None:
    """Return how `weights` were converted; None if they were not.

    Reads the nearest provenance.json in the folders from the file up to, but not including,
    `root`.  Raises OSError for an error that may pass.
    """
    folder = weights.parent
    while folder != root and folder.is_relative_to(root):
        provenance = folder / PROVENANCE
        if provenance.is_file():
            return _read(provenance)
        folder = folder.parent
    return None


def _read(path: Path) -> Provenance | None:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        stored = json.loads(path.read_text("utf-8"))
        parameters = stored["parameters"]
        model_id = parameters["model_id"]
        choices = {name: parameters[name] for name in _CHOICES if parameters.get(name) is not None}
        quality = stored.get("quality")
    except OSError as error:
        # Access that is denied to this file alone is not likely to pass.
        if passing_cause(error) and not isinstance(error, PermissionError):
            # Else the model would count as an original until its file changes.
            raise
        return None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(model_id, str) or not model_id:
        return None
    figures = _scalars(quality) if isinstance(quality, dict) else {}
    return Provenance(model_id[:_LONGEST_ID], _scalars(choices), figures)


def _scalars(values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the numbers and short texts of an object that somebody else may have written."""
    found: dict[str, JsonValue] = {}
    for name, value in list(values.items())[:_MOST_FIGURES]:
        if isinstance(value, str):
            found[name[:_LONGEST_TEXT]] = value[:_LONGEST_TEXT]
        elif isinstance(value, bool | int | float):
            found[name[:_LONGEST_TEXT]] = value
    return found
