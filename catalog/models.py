"""What the catalog keeps: models, where they come from, and what a scan found."""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from backends.base import EngineOptions, ModelInfo
from core.types import Priority as Priority

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
class Converted:
    """Files that were converted here, in a scanned folder; `model_id` is what they came from."""

    root: str
    model_id: str


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model that needs no files."""


Source: TypeAlias = Local | Package | Converted | BuiltIn


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What a user set for one model; None leaves the server's default.

    `context_length` is an upper bound in tokens.  A model that was idle for `keep_alive_s` seconds
    is unloaded; one with `pin` is never evicted.  `priority` is the class of requests that name
    none.  `max_sequences` are generated at the same time.  `kv_type` is what keys and values are
    kept as, of those that `backends.abilities` knows for the model.  `tool_parser` names the family
    of the model's tool calls where its chat template does not tell.
    """

    context_length: int | None = None
    keep_alive_s: float | None = None
    pin: bool | None = None
    priority: Priority | None = None
    max_sequences: int | None = None
    kv_type: str | None = None
    tool_parser: str | None = None

    def applied_to(self, options: EngineOptions) -> EngineOptions:
        """Return how this model is opened; the server's own context bound holds as well."""
        bounds = [n for n in (self.context_length, options.context_tokens) if n is not None]
        return replace(
            options,
            context_tokens=min(bounds, default=None),
            max_sequences=self.max_sequences or options.max_sequences,
            kv_type=self.kv_type or options.kv_type,
            tool_parser=self.tool_parser,
        )


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
    settings: ModelSettings = field(default_factory=ModelSettings)

    @property
    def key(self) -> str:
        """What the entry is recognised by from scan to scan."""
        return record_key(self.info)


@dataclass(frozen=True, slots=True)
class ScannedModel:
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
    def has_changes(self) -> bool:
        """Whether the catalog changed."""
        return bool(self.added or self.changed or self.refused or self.missing)
