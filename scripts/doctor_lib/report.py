"""Writes the doctor's report: a table to read and JSON, without names and secrets."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from scripts.doctor_lib.privacy import Privacy
from scripts.doctor_lib.row import Row

_VERSION = 1


def write_report(
    folder: Path,
    rows: Sequence[Row],
    facts: Mapping[str, object],
    privacy: Privacy,
) -> tuple[Path, Path]:
    """Write both files, readable by this user only; return their paths.  Raises OSError."""
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    base = folder / f"impetus-doctor-{stamp}"
    text = "\n".join(line for row in rows for line in row.lines())
    document = {"version": _VERSION, "when": stamp, **facts, "rows": [asdict(row) for row in rows]}
    data = json.dumps(_hidden(document, privacy), indent=1, ensure_ascii=False)
    written = []
    for path, content in (
        (base.with_suffix(".txt"), privacy.hide_paths(text)),
        (base.with_suffix(".json"), data),
    ):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(content + "\n")
        written.append(path)
    return written[0], written[1]


def _hidden(value: object, privacy: Privacy) -> object:
    """Hide in every text before it is encoded: JSON escapes what would be looked for."""
    if isinstance(value, str):
        return privacy.hide_paths(value)
    if isinstance(value, Mapping):
        return {name: _hidden(item, privacy) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(item, privacy) for item in value]
    return value
