"""The last figures of every section, so that one can be measured again by itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench_lib.report.figures import Verdict
from scripts.bench_lib.section import Section


@dataclass(frozen=True, slots=True)
class Kept:
    """A section as it was measured: `name` on the command line, when, how often, by what."""

    name: str
    measured_at: str
    most_rounds: int
    load_average: str
    section: Section
    python: str = ""

    @property
    def parts(self) -> list[str]:
        """The chapter's text, which says when it was measured."""
        how = f"at most {self.most_rounds} rounds; load average before: {self.load_average}"
        how += f"; Python {self.python}" if self.python else ""
        return [f"Measured {self.measured_at}; {how}.\n", *self.section.parts]


def merged(known: Sequence[Kept], new: Sequence[Kept], order: Sequence[str]) -> list[Kept]:
    """Return all sections in order, the new in the place of the known ones of their names.

    One that could not be measured takes no other's place.
    """
    renewed = {kept.name for kept in new if not kept.section.is_failed}
    last = [kept for kept in known if kept.name not in renewed]
    left = {kept.name for kept in last}
    fresh = [kept for kept in new if kept.name in renewed or kept.name not in left]
    return sorted([*last, *fresh], key=lambda kept: order.index(kept.name))


def read_kept(path: Path, order: Sequence[str]) -> list[Kept]:
    """Return what `kept_text` gave; sections that there are no more are left out."""
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
