"""The notes of a scan on files that are no models, or whose inspection failed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backends.base import Backend
from catalog.inspections import QUIET_S, Inspection, arriving, failed_again, is_arriving
from catalog.scan.surroundings import Surroundings

# Part of every fingerprint; incrementing it makes the next scan read all files again.
READER_VERSION = 7
# Formats judge these files without a look at the files beside them.
_STANDALONE = frozenset(
    (".md", ".txt", ".json", ".jinja", ".py", ".yaml", ".yml", ".html", ".pdf", ".png", ".jpg")
)
# The manifest of a Core ML package is judged by what the package contains.
_NOT_STANDALONE = "Manifest.json"


@dataclass(slots=True)
class InspectionNotes:
    """The notes that one scan found in the catalog, and those that it makes.

    A note holds for one reader version, one set of formats and one state of the file; for files
    that may be part of a model also for one state of their folder, because a missing part may
    have been added.  `now` is in Unix seconds.
    """

    known: Mapping[str, Inspection]
    backends: Sequence[Backend]
    now: float
    urgent: Collection[str] = ()
    current: dict[str, Inspection] = field(default_factory=dict)
    around: Surroundings = field(default_factory=Surroundings)

    @property
    def formats(self) -> str:
        """The names of the formats that are asked about files."""
        return ",".join(sorted(backend.name for backend in self.backends))

    def holding(self, path: Path, signature: str) -> Inspection | None:
        """Return the note that makes an inspection needless, and keep it; None if there is none."""
        noted = self.known.get(str(path))
        if noted is None or noted.signature != self._signature(path, signature):
            return None
        if noted.is_due(self.now) or (noted.verdict == "uninspected" and str(path) in self.urgent):
            return None
        self.current[noted.path] = noted
        return noted

    def note_unknown(self, path: Path, signature: str) -> None:
        """Note that no format recognizes the file."""
        key = str(path)
        self.current[key] = Inspection(key, self._signature(path, signature), "unknown")

    def note_failure(self, path: Path, signature: str, reason: str) -> None:
        """Note that the inspection failed for a reason that says nothing about the content."""
        key = str(path)
        full = self._signature(path, signature)
        self.current[key] = failed_again(key, full, reason, self.known.get(key), self.now)

    def note_arriving(
        self, path: Path, signature: str, reason: str, look_s: float = QUIET_S
    ) -> None:
        """Note that the file, or what belongs to it, is still being written."""
        key, full = str(path), self._signature(path, signature)
        self.current[key] = arriving(key, full, reason, self.now, look_s)

    def arriving(self, path: Path) -> Inspection | None:
        """Return the note that the file was still being written at the last scan, if there is."""
        noted = self.known.get(str(path))
        return noted if noted is not None and is_arriving(noted) else None

    def next_look_s(self) -> float | None:
        """Return the seconds until the first file that is arriving is looked at; None: no file."""
        due = [one.retry_at for one in self.current.values() if is_arriving(one)]
        return max(min(due) - self.now, 0.0) if due else None

    @property
    def has_unread(self) -> bool:
        """Whether a file could not be inspected, and is not arriving."""
        return any(one.verdict == "uninspected" for one in self.current.values())

    def keep(self, key: str) -> None:
        """Keep the note on a file that cannot be read for now, if there is one."""
        if key in self.known:
            self.current[key] = self.known[key]

    def changed(self) -> list[Inspection]:
        """Return the notes to write."""
        return [one for key, one in self.current.items() if self.known.get(key) != one]

    def outdated(self) -> list[str]:
        """Return the paths of notes to delete."""
        return [key for key in self.known if key not in self.current]

    def _signature(self, path: Path, signature: str) -> str:
        parts = [str(READER_VERSION), self.formats, signature]
        if path.suffix.lower() not in _STANDALONE or path.name == _NOT_STANDALONE:
            parts.append(self.around.folder(path.parent))
        return ":".join(parts)
