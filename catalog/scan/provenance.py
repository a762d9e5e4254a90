"""Reads from provenance.json which model a folder was converted from."""

import json
from pathlib import Path

from core.files import passing_cause

PROVENANCE = "provenance.json"
_MAX_BYTES = 1024 * 1024
_LONGEST_ID = 200


def converted_from(weights: Path, root: Path) -> str:
    """Return the id of the model that `weights` was converted from; empty if it was not.

    Reads the nearest provenance.json in the folders from the file up to, but not including,
    `root`.  Raises OSError for an error that may pass.
    """
    folder = weights.parent
    while folder != root and folder.is_relative_to(root):
        provenance = folder / PROVENANCE
        if provenance.is_file():
            return _model_id(provenance)
        folder = folder.parent
    return ""


def _model_id(provenance: Path) -> str:
    try:
        if provenance.stat().st_size > _MAX_BYTES:
            return ""
        model_id = json.loads(provenance.read_text("utf-8"))["parameters"]["model_id"]
    except OSError as error:
        # Access that is denied to this file alone is not likely to pass.
        if passing_cause(error) and not isinstance(error, PermissionError):
            # Else the model would count as an original until its file changes.
            raise
        return ""
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return model_id[:_LONGEST_ID] if isinstance(model_id, str) else ""
