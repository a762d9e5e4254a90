"""What the catalog keeps: models, where they come from, and what a scan found."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from backends.base import ModelInfo

RecordState: TypeAlias = Literal["ok", "refused", "missing"]


@dataclass(frozen=True, slots=True)
class Local:
    """Files in a folder that is scanned."""

    root: str


@dataclass(frozen=True, slots=True)
class Package:
    """Files that an installed Python package brought, used where they lie."""

    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model that needs no files."""


Source: TypeAlias = Local | Package | BuiltIn


def record_key(info: ModelInfo) -> str:
    """Return what a model is recognised by from scan to scan: its first file's path."""
    return str(info.files[0]) if info.files else f"{info.format}:{info.name}"


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A catalog entry; `info.name` is the bare name, `added_at` unix seconds.

    A refused entry's `info` knows its format, file and size only; `reason` says why it is not ok.
    """

    id: str
    info: ModelInfo
    source: Source
    fingerprint: str
    added_at: float
    aliases: tuple[str, ...] = ()
    state: RecordState = "ok"
    reason: str = ""

    @property
    def key(self) -> str:
        """What the entry is recognised by from scan to scan."""
        return record_key(self.info)


@dataclass(frozen=True, slots=True)
class Found:
    """What a scan learned about one model; `reason` is why it is refused, if it is."""

    info: ModelInfo
    source: Source
    fingerprint: str
    reason: str = ""

    @property
    def state(self) -> RecordState:
        """Whether the model can be served."""
        return "refused" if self.reason else "ok"


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a scan changed, as ids; `skipped` are paths with the reason."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def has_news(self) -> bool:
        """Whether the catalog changed."""
        return bool(self.added or self.changed or self.refused or self.missing)
