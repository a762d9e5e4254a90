"""The last figures of every section, so that one can be measured again by itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench_lib.figures import Verdict
from scripts.bench_lib.section import Section


@dataclass(frozen=True, slots=True)
class Kept:
    """A section as it was measured: `name` on the command line, when, and under which load."""

    name: str
    measured_at: str
    load_average: str
    section: Section

    @property
    def parts(self) -> list[str]:
        """The chapter's text, which says when it was measured."""
        when = f"Measured {self.measured_at}; load average before: {self.load_average}.\n"
        return [when, *self.section.parts]


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
    """Return what `write_kept` wrote; sections that there are no more are left out."""
    if not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [_kept(entry) for entry in entries if entry["name"] in order]


def write_kept(path: Path, sections: Sequence[Kept]) -> None:
    """Replace the file in one step."""
    text = json.dumps([asdict(kept) for kept in sections], indent=1, ensure_ascii=False)
    scratch = path.with_suffix(".json.tmp")
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)


def _kept(entry: dict[str, Any]) -> Kept:
    fields = dict(entry["section"])
    fields["verdicts"] = [Verdict(**verdict) for verdict in fields["verdicts"]]
    fields["setup"] = [(what, value) for what, value in fields["setup"]]
    return Kept(entry["name"], entry["measured_at"], entry["load_average"], Section(**fields))
