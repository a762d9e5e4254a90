"""Data types of the catalog: model records, their sources and settings, and scan results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from backends.base import EngineOptions, ModelInfo
from backends.prompt.named_templates import template_capabilities
from core.types import Capability, JsonValue
from core.types import Priority as Priority

RecordState: TypeAlias = Literal["ok", "refused", "missing", "uninspected"]


# The detail of a model with more bare names than one, which it lists with commas between them.
OTHER_NAMES = "other_names"
# The detail with the system prompt that a model came with.
SYSTEM_PROMPT = "system_prompt"
# The details with the stop strings that a model came with, as a JSON list, and its context.
STOP_STRINGS = "stop_strings"
DEFAULT_CONTEXT = "default_context"
# The detail with a digest of a model's files; those of copies are equal.
CONTENT = "content"
# The detail with a digest of what the store of another program says of a model.
STORE_FACTS = "store_facts"
# In the folder of a model that was downloaded: where from, and which files.
DOWNLOAD_RECORD = "download.json"
# In the folder of a model that was uploaded or copied: which files.
ARRIVAL_RECORD = "upload.json"
# In the folder of a converted model: what it was made of.
PROVENANCE = "provenance.json"


@dataclass(frozen=True, slots=True)
class Local:
    """Files in a scanned model folder."""

    root: str


@dataclass(frozen=True, slots=True)
class Package:
    """Files inside an installed Python package, used in place."""

    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class Converted:
    """Files in a scanned folder that this server converted from the model `model_id`.

    `choices` are the format, quantization and options of the conversion, `quality` how the result
    differs from its source (`catalog.convert.quality`); empty where they are not known.
    """

    root: str
    model_id: str
    choices: Mapping[str, JsonValue] = field(default_factory=dict)
    quality: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model without files of its own."""


Source: TypeAlias = Local | Package | Converted | BuiltIn


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A user's settings for one model; None means the server's default.

    `context_length` is an upper bound in tokens.  A model idle for `keep_alive_s` seconds is
    unloaded; a model with `pin` is never evicted.  `priority` applies to requests without one.
    `max_sequences` bounds the sequences generated at the same time.  `kv_type` is the type of the
    KV cache, one of those that `backends.abilities` lists for the model.  `tool_parser` is the
    tool call family of a model whose chat template does not show it.  `runtime` is the library that
    runs a model which several can run.  `continue_answers` applies to chats that do not say whether
    an assistant's last message is continued.  A `deterministic` model runs one sequence at a time;
    see `EngineOptions`.

    These fill what requests leave out: `sampling` by the names of parameters, `system_prompt` in
    chats without one, `template_kwargs` for the chat template, which `chat_template` replaces.
    `tags`, `favourite` and `notes` are for people alone.
    """

    context_length: int | None = None
    keep_alive_s: float | None = None
    pin: bool | None = None
    priority: Priority | None = None
    max_sequences: int | None = None
    kv_type: str | None = None
    tool_parser: str | None = None
    runtime: str | None = None
    continue_answers: bool | None = None
    deterministic: bool | None = None
    sampling: Mapping[str, float] | None = None
    system_prompt: str | None = None
    template_kwargs: Mapping[str, JsonValue] | None = None
    chat_template: str | None = None
    tags: Sequence[str] | None = None
    favourite: bool | None = None
    notes: str | None = None

    def described(self, info: ModelInfo) -> ModelInfo:
        """Return `info` with the chat template of these settings, and what that one supports."""
        if self.chat_template is None:
            return info
        from_template = {Capability.TOOLS, Capability.REASONING}
        return replace(
            info,
            chat_template=self.chat_template,
            tool_template=None,
            rag_template=None,
            capabilities=(info.capabilities - from_template)
            | template_capabilities((self.chat_template,)),
        )

    def applied_to(self, options: EngineOptions) -> EngineOptions:
        """Return `options` with these settings; the lower of both context bounds applies."""
        bounds = [n for n in (self.context_length, options.context_tokens) if n is not None]
        return replace(
            options,
            context_tokens=min(bounds, default=None),
            # Rows that are computed together are rounded together.
            max_sequences=1 if self.deterministic else self.max_sequences or options.max_sequences,
            kv_type=self.kv_type or options.kv_type,
            tool_parser=self.tool_parser,
            runtime=self.runtime,
            deterministic=bool(self.deterministic),
        )


def signatures_of(fingerprint: str) -> tuple[str, ...]:
    """Return the signatures of the files that a fingerprint was made of.

    After them and a `|` comes what was around the files.
    """
    _, _, joined = fingerprint.partition("|")[0].partition(":")
    return tuple(joined.split(",")) if joined else ()


def record_key(info: ModelInfo) -> str:
    """Return the key that identifies a model across scans: the path of its first file."""
    return str(info.files[0]) if info.files else f"{info.format}:{info.name}"


def unread_info(format: str, name: str, path: Path, size_bytes: int = 0) -> ModelInfo:
    """Return the description of a model of which nothing but its name and place is known."""
    return ModelInfo(
        format=format,
        name=name,
        architecture="",
        quantization="",
        files=(path,),
        size_bytes=size_bytes,
        parameters=0,
        context_length=0,
        capabilities=frozenset(),
    )


def revised_path(key: str) -> str:
    """Return a key without its revision in a Hugging Face cache; empty if it is not in one."""
    before, found, after = key.partition("/snapshots/")
    _, _, inner = after.partition("/")
    return f"{before}{found}{inner}" if found and inner else ""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A catalog entry; `info.name` is the bare name, `added_at` is in Unix seconds.

    The `info` of a refused entry has only format, file and size; `reason` says why it is not ok.
    An entry is uninspected if its file changed and could not be inspected since.
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
        """The key that identifies the entry across scans."""
        return record_key(self.info)

    def engine_options(self, options: EngineOptions) -> EngineOptions:
        """Return `options` with the settings, and with the context that the model came with."""
        own, settings = self.info.details.get(DEFAULT_CONTEXT), self.settings
        if settings.context_length is None and type(own) is int:
            settings = replace(settings, context_length=own)
        return settings.applied_to(options)

    @property
    def signatures(self) -> tuple[str, ...]:
        """The signature that each of `info.files` had; see `catalog.changes`."""
        return signatures_of(self.fingerprint)


@dataclass(frozen=True, slots=True)
class ScannedModel:
    """One model as a scan found it; `reason` says why it is refused, empty if it is not."""

    info: ModelInfo
    source: Source
    fingerprint: str
    reason: str = ""

    @property
    def state(self) -> RecordState:
        """The state of the new catalog entry."""
        return "refused" if self.reason else "ok"


@dataclass(frozen=True, slots=True)
class ScanReport:
    """The ids of the models that a scan changed; `skipped` lists paths with the reason.

    `next_look_s` is when to scan again for models whose files are being written, in seconds.
    `folders` are the folders that were listed, with their modification times in ns.  With
    `has_unread` some files could not be inspected, which is tried again.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    next_look_s: float | None = None
    folders: Mapping[Path, int] = field(default_factory=dict, repr=False)
    has_unread: bool = False

    @property
    def has_changes(self) -> bool:
        """Whether the catalog changed."""
        return bool(self.added or self.changed or self.refused or self.missing)
