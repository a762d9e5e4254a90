"""Scans one folder without the catalog, to tell whether a model in it can be used."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.base import Backend
from catalog.models import ScannedModel
from catalog.scan.identify import Outcome, Uninspected
from catalog.scan.notes import InspectionNotes
from catalog.scan.run import ScanRun
from catalog.scan.walk import MAX_FILES, walk
from core.errors import BrokenModel, Unavailable

# Nothing is being written any more, however new the files are.
_LATER_S = 3600.0


def try_scan(
    folder: Path, backends: Sequence[Backend], identify_file: Callable[[Path], Outcome]
) -> list[ScannedModel]:
    """Return the models in `folder` that a scan of it would accept, at least one; blocks.

    Raises BrokenModel with the reason if there is none, Unavailable if that could not be told.
    """
    failures: list[str] = []

    def identify(path: Path) -> Outcome:
        outcome = identify_file(path)
        if isinstance(outcome, Uninspected):
            failures.append(outcome.reason)
        return outcome

    found = walk([folder])
    run = ScanRun({}, InspectionNotes({}, backends, time.time() + _LATER_S), identify, found)
    for candidate in found.candidates:
        run.add_file(candidate)
    run.add_refusals()
    models = [model for model in run.found if not model.reason]
    if models:
        return models
    if failures:
        raise Unavailable(f"The model was not inspected: {failures[0]}.")
    refused = next((model.reason for model in run.found), "")
    if refused:
        raise BrokenModel(refused)
    names = ", ".join(backend.name for backend in backends)
    left_out = f" ({found.skipped[0]})" if found.skipped else ""
    raise BrokenModel(
        f"There is no model of a format that is served here ({names}) among its "
        f"{min(len(found.candidates), MAX_FILES)} files{left_out}."
    )
