"""Interfaces (Protocols) between the HTTP routes and the rest; route tests need no Ray."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from core.keys import ApiKey
from core.settings import Settings
from core.types import (
    DEFAULT_EMBEDDING,
    Capability,
    EmbeddingParams,
    Embeddings,
    GenerationEvent,
    GenerationRequest,
    JsonValue,
    Prompt,
    Relevance,
    RerankInputs,
    TokenizedPrompt,
    TokenizeOptions,
)
from core.types import Priority as Priority
from router.conversion_service import Conversions
from router.events.hub import EventHub
from router.hub_service import Hub
from router.job_service import ConversionView, Jobs
from router.monitor.chart_service import Monitor
from router.monitor.log_service import Logs
from router.monitor.settings_service import ServerSettings
from router.upload_service import LocalFiles, Uploads

ModelState: TypeAlias = Literal[
    "resident",
    "loading",
    "available",
    "unavailable",
    "refused",
    "failed",
    "quarantined",
    "missing",
]
EventCallback: TypeAlias = Callable[[Sequence[GenerationEvent]], None]


@dataclass(frozen=True, slots=True)
class FitView:
    """How well a client can use a model; `reasons` say what is missing."""

    level: Literal["ok", "limited", "no"]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """The runtime that the scan chose for a model, and what it found about the other one.

    `alternative` is the runtime that a model's settings may name instead, empty if there is none.
    """

    runtime: str
    reason: str
    alternative: str
    alternative_reason: str


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """What a model's own settings fill in where a request does not say.

    `sampling` has fields of `SamplingParams` by name.  `stop` are stop strings for requests without
    any.
    """

    sampling: Mapping[str, float] = field(default_factory=dict)
    system_prompt: str = ""
    template_kwargs: Mapping[str, JsonValue] = field(default_factory=dict)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelView:
    """A catalog entry as the API shows it.

    `context_length` is the trained context, `max_model_len` the granted or estimated one, both in
    tokens.  `reason` says why a model cannot be used.  `created_at` is in Unix seconds.  `runtime`
    is the library that runs the model here, `runtime_reason` why; `runtime_choice` is what the scan
    found, None for formats with one runtime.  `priority` applies to requests that name none.
    `compatibility` is by client.  `limitations` tell what a loaded model does otherwise than usual,
    a sentence each.  `continue_answers` is the model's own setting, None for the server's.
    `duplicates` are the ids of models with the same files at other places.
    `conversion` says what a converted model was made of and how, None for others.
    `alias_of` is the model's id in an entry whose `id` is an alias.  `defaults` fill what requests
    leave out, None if there are none.  `source` is whose folder the files are in: `impetus`,
    `folder` for one of the user's, `huggingface`, `lmstudio`, `ollama`, `llama.cpp`; or `package`,
    `converted`, `built-in`.
    """

    id: str
    name: str
    format: str
    architecture: str
    quantization: str
    parameters: int
    size_bytes: int
    context_length: int
    max_model_len: int
    capabilities: frozenset[Capability]
    state: ModelState
    reason: str
    aliases: tuple[str, ...]
    license: str
    created_at: int
    runtime: str = ""
    runtime_reason: str = ""
    runtime_choice: RuntimeView | None = None
    converted_from: str = ""
    conversion: ConversionView | None = None
    priority: Priority = "interactive"
    compatibility: Mapping[str, FitView] = field(default_factory=dict)
    limitations: tuple[str, ...] = ()
    continue_answers: bool | None = None
    alias_of: str = ""
    duplicates: tuple[str, ...] = ()
    defaults: RequestDefaults | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class SettingsView:
    """A model's own settings; None means the server's default.

    `context_length` is an upper bound in tokens.  A model idle for `keep_alive_s` seconds is
    unloaded; one with `pin` is never evicted.  `priority` is the class of requests that name none.
    `max_sequences` bounds concurrent sequences.  `kv_type` is the data type of the KV cache.
    `tool_parser` names the tool-call format if the chat template does not reveal it.  `runtime` is
    the library that runs the model, if several can.  `continue_answers`: a chat's last message, if
    it is the assistant's, is continued unless the request says otherwise.  With `deterministic` the
    same request always gets the same answer, one request at a time.

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


@dataclass(frozen=True, slots=True)
class MemoryPreviewView:
    """The memory of a model with certain settings, and what a load would evict at the moment.

    `fit`: `now`; `after_unloading` the idle models in `evicted`; `after_requests`, when models
    answer requests, or jobs hold memory; `no`, with the `reason`.  `context_tokens` is what would
    be granted.  `held_bytes` is in use by others, of the `budget_bytes` for all models;
    `limit_bytes` is what other applications leave of that.
    """

    fit: Literal["now", "after_unloading", "after_requests", "no"]
    reason: str
    evicted: tuple[str, ...]
    context_tokens: int
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    budget_bytes: int
    held_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class LibraryEntry:
    """A model as it is while nothing is loaded, with its settings."""

    view: ModelView
    settings: SettingsView


@dataclass(frozen=True, slots=True)
class LibraryView:
    """All models, by id.

    `entries` is the same object until the catalog changes.  `changed` are the views, by id, of the
    models that are loaded, being loaded or failed.
    """

    entries: Sequence[LibraryEntry]
    changed: Mapping[str, ModelView]


@dataclass(frozen=True, slots=True)
class Binned:
    """A deleted model in the bin; `paths` are below its model folder, times in Unix seconds."""

    id: str
    model_id: str
    paths: tuple[str, ...]
    freed_bytes: int
    deleted_at: float
    purge_at: float


@dataclass(frozen=True, slots=True)
class DecisionView:
    """What the scheduler did about an event, and why; `at` is in Unix seconds."""

    at: float
    event: str
    action: str
    reason: str


class Catalog(Protocol):
    """Lists and resolves models."""

    async def resolve(self, name: str) -> ModelView:
        """Return the model that an id or alias means.

        Raises ModelNotFound with the nearest names, BrokenModel for a refused file,
        BackendUnavailable with the reason.
        """
        ...

    async def models(self) -> Sequence[ModelView]:
        """Return all models, by id."""
        ...

    async def library(self) -> LibraryView:
        """Return all models with their settings, for queries."""
        ...


class Dispatcher(Protocol):
    """Runs requests on the engine that holds the model, loading the model first if needed."""

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        """Run the request to its end, passing its events to `on_events`, `Finished` last.

        `on_events` is called on the event loop as events arrive, and never after this has returned
        or raised; it must not block.  Cancelling stops the work.
        """
        ...

    async def embed(
        self,
        model_id: str,
        inputs: Sequence[str | Sequence[int]],
        priority: Priority = "interactive",
        deadline_s: float | None = None,
        params: EmbeddingParams = DEFAULT_EMBEDDING,
    ) -> Embeddings:
        """Return one vector per input, in order; raises TimedOut after `deadline_s` seconds.

        Raises ContextLengthExceeded for an input that may not be cut, RequestError for `params`
        that the model does not have.
        """
        ...

    async def rerank(
        self,
        model_id: str,
        inputs: RerankInputs,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Relevance:
        """Return one score per document, in order; raises TimedOut after `deadline_s` seconds.

        Raises ContextLengthExceeded for a pair that may not be cut.
        """
        ...

    async def count_tokens(
        self, model_id: str, prompt: Prompt, deadline_s: float | None = None
    ) -> int:
        """Return the length of `prompt` in tokens, template and tools included.

        Raises UnsupportedCapability for an engine that cannot count tokens, and TimedOut after
        `deadline_s` seconds.
        """
        ...

    async def tokenize(
        self,
        model_id: str,
        prompt: Prompt,
        options: TokenizeOptions,
        deadline_s: float | None = None,
    ) -> TokenizedPrompt:
        """Return the prompt's text and tokens.  Raises as `count_tokens` does."""
        ...


class Management(Protocol):
    """Administration of models; ids are those of the catalog."""

    async def settings_of(self, model_ids: Sequence[str]) -> Mapping[str, SettingsView]:
        """Return the settings of those models that the catalog knows."""
        ...

    async def change_settings(self, model_id: str, changes: Mapping[str, Any]) -> SettingsView:
        """Set the fields of `SettingsView` that `changes` names; return all.

        Raises ModelNotFound.
        """
        ...

    async def check_settings(self, model_id: str, changes: Mapping[str, Any]) -> SettingsView:
        """Return the settings that `change_settings` would store; raises what it does."""
        ...

    async def preview_memory(
        self, model_id: str, changes: Mapping[str, Any]
    ) -> MemoryPreviewView | None:
        """Return what the model would take with these settings; None if that is not known now."""
        ...

    async def aliases(self) -> Mapping[str, str]:
        """Return every alias with its model's id."""
        ...

    async def set_alias(self, alias: str, model_id: str) -> None:
        """Point an alias to a model, replacing an earlier target.

        Raises RequestError for a malformed alias or too many, ModelNotFound.
        """
        ...

    async def remove_alias(self, alias: str) -> None:
        """Delete an alias.  Raises NotFound."""
        ...

    async def load(self, model_id: str) -> None:
        """Return once the model is in memory.

        Raises ModelNotFound, ModelFileMissing, BrokenModel, Unavailable.
        """
        ...

    async def unload(self, model_id: str) -> None:
        """Return once the model is out of memory.  Raises what the scheduler refuses with."""
        ...

    async def delete_model(self, model_id: str) -> Binned:
        """Move a model's files into the bin.

        Raises ModelNotFound, ModelInUse, RequestError if the files are not the user's own.
        """
        ...

    async def locate_model(self, model_id: str, path: str) -> None:
        """Give a model whose files are gone its files at another place.

        Raises ModelNotFound, ModelInUse, RequestError if the files there are not the model's.
        """
        ...

    async def binned(self) -> Sequence[Binned]:
        """Return what is in the bin, oldest first."""
        ...

    async def restore_model(self, entry_id: str) -> Binned:
        """Move a model back from the bin.  Raises NotFound, RequestError if its place is taken."""
        ...

    async def purge_model(self, entry_id: str) -> Binned:
        """Delete a model in the bin for good.  Raises NotFound."""
        ...

    async def decisions(self) -> Sequence[DecisionView]:
        """Return the scheduler's last decisions."""
        ...


class Credentials(Protocol):
    """API keys that are stored, and sessions of browsers."""

    @property
    def has_keys(self) -> bool:
        """Whether there are any, also expired ones; does not block."""
        ...

    def known_key(self, text: bytes) -> ApiKey | None:
        """Return the key with this text if it is valid and was verified before; does not block."""
        ...

    async def verify_key(self, text: bytes) -> ApiKey | None:
        """Return the key with this text if it is valid; about 50 ms, one at a time.

        Raises RateLimited if too many texts wait for that.
        """
        ...

    async def keys(self) -> Sequence[ApiKey]:
        """Return all keys, expired ones as well, oldest first.  Raises Unavailable."""
        ...

    async def create_key(
        self, name: str, scopes: Sequence[str], expires_at: float | None
    ) -> tuple[ApiKey, str]:
        """Store a new key; return it and its text, which is not stored.

        `expires_at` is in Unix seconds.  Raises RequestError, Unavailable.
        """
        ...

    async def revoke_key(self, key_id: str) -> None:
        """Delete a key; its next request is refused.  Raises NotFound, Unavailable."""
        ...

    async def open_session(self, code: str) -> str | None:
        """Return the token of a new session; None for a code that is used or was never given."""
        ...

    async def has_session(self, token: str) -> bool:
        """Return whether this is the token of a session that has not ended."""
        ...

    async def close_session(self, token: str) -> None:
        """End a session, if there is one."""
        ...


class Health(Protocol):
    """Whether the server can take requests."""

    async def not_ready_because(self) -> str:
        """Return why not, or an empty string."""
        ...


class Telemetry(Protocol):
    """Metrics of other processes."""

    async def refresh(self) -> None:
        """Fetch them for the next scrape; never raises, and returns within seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the HTTP application depends on; without `management` there is no `/api/`.

    Without `jobs` there are no long jobs, without `hub` no searches, without `conversions` no
    conversions on request, without `credentials` no keys but that of the settings, without
    `uploads`, `files`, `events`, `logs`, `monitor` and `stored_settings` none.  `management_token`
    lets a web page use `/api/`; with an empty one no page can.
    """

    settings: Settings
    catalog: Catalog
    dispatcher: Dispatcher
    health: Health
    telemetry: Telemetry
    management: Management | None = None
    management_token: str = field(default="", repr=False)
    jobs: Jobs | None = None
    hub: Hub | None = None
    credentials: Credentials | None = None
    uploads: Uploads | None = None
    files: LocalFiles | None = None
    conversions: Conversions | None = None
    events: EventHub | None = None
    logs: Logs | None = None
    monitor: Monitor | None = None
    stored_settings: ServerSettings | None = None
