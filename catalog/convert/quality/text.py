"""Reads the text on which models are compared: English, code, other scripts, a dialogue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("text.txt")
_BEGIN = "=== "


@dataclass(frozen=True, slots=True)
class Text:
    """One of the texts; `kind` is its name."""

    kind: str
    text: str


def read_texts() -> tuple[Text, ...]:
    """Return the texts of the package's file, about 4 KB in all."""
    _, *parts = ("\n" + _FILE.read_text(encoding="utf-8")).split("\n" + _BEGIN)
    found = []
    for part in parts:
        kind, _, text = part.partition("\n")
        found.append(Text(kind, text.strip("\n")))
    return tuple(found)


def lines_of(texts: Sequence[Text], limit: int, characters: int) -> tuple[str, ...]:
    """Return up to `limit` lines of the texts, cut to `characters`, the longest first."""
    lines = [line.strip()[:characters] for each in texts for line in each.text.splitlines()]
    return tuple(sorted(lines, key=len, reverse=True)[:limit])
