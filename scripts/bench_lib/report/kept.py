"""Stores the last figures of every section, so sections can be measured separately."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench_lib.report.figures import Verdict
from scripts.bench_lib.section import Section


@dataclass(frozen=True, slots=True)
class Kept:
    """A measured section: its name on the command line, date, rounds, load and Python."""

    name: str
    measured_at: str
    most_rounds: int
    load_average: str
    section: Section
    python: str = ""

    @property
    def parts(self) -> list[str]:
        """The section's text, with the date of the measurement."""
        how = f"at most {self.most_rounds} rounds; load average before: {self.load_average}"
        how += f"; Python {self.python}" if self.python else ""
        return [f"Measured {self.measured_at}; {how}.\n", *self.section.parts]


def merged(known: Sequence[Kept], new: Sequence[Kept], order: Sequence[str]) -> list[Kept]:
    """Return all sections in order; new ones replace known ones of the same name.

    A section that could not be measured does not replace another.
    """
    renewed = {kept.name for kept in new if not kept.section.is_failed}
    last = [kept for kept in known if kept.name not in renewed]
    left = {kept.name for kept in last}
    fresh = [kept for kept in new if kept.name in renewed or kept.name not in left]
    return sorted([*last, *fresh], key=lambda kept: order.index(kept.name))


def read_kept(path: Path, order: Sequence[str]) -> list[Kept]:
    """Read the sections that `kept_text` wrote; skips sections that no longer exist."""
    if not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [_kept(entry) for entry in entries if entry["name"] in order]


def kept_text(sections: Sequence[Kept]) -> str:
    """Return the sections as JSON."""
    return json.dumps([asdict(kept) for kept in sections], indent=1, ensure_ascii=False) + "\n"


def _kept(entry: dict[str, Any]) -> Kept:
    fields = dict(entry["section"])
    fields["verdicts"] = [Verdict(**verdict) for verdict in fields["verdicts"]]
    fields["setup"] = [(what, value) for what, value in fields["setup"]]
    return Kept(**{**entry, "section": Section(**fields)})
