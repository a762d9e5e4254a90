"""`/api/models`: each model's own settings, loading and unloading."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, JsonValue
from starlette.requests import Request
from starlette.responses import Response

from core.errors import RequestError
from core.text import escaped
from router.api.answer import Endpoint, answer
from router.context import RouteContext, record_of
from router.job_service import Answer, ConversionView
from router.requests.limits import MAX_ERROR_CHARACTERS, MAX_INT32
from router.requests.strict_body import EmptyBody, StrictBody, read_strict
from router.services import Management, MemoryPreviewView, ModelView, Priority, SettingsView
from router.v1.models import ModelFacts, find_model, model_facts

Tag: TypeAlias = Annotated[str, Field(min_length=1, max_length=50)]

_LONGEST_TEXT = 32_000
_YEAR_S = 366 * 24 * 3600


class SamplingDefaults(StrictBody):
    """Sampling of requests that do not say; without a value the model's own applies."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None


class SettingsPatch(StrictBody):
    """Changes of settings: an omitted field keeps its value, null resets it to the default."""

    context_length: Annotated[int, Field(ge=16, le=MAX_INT32)] | None = None
    keep_alive_s: Annotated[float, Field(ge=0, le=_YEAR_S)] | None = None
    pin: bool | None = None
    priority: Priority | None = None
    max_sequences: Annotated[int, Field(ge=1, le=256)] | None = None
    kv_type: Annotated[str, Field(min_length=1, max_length=16)] | None = None
    tool_parser: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    runtime: Literal["mlx", "pytorch"] | None = None
    continue_answers: bool | None = None
    deterministic: bool | None = None
    sampling: SamplingDefaults | None = None
    system_prompt: Annotated[str, Field(max_length=_LONGEST_TEXT)] | None = None
    template_kwargs: Annotated[dict[str, JsonValue], Field(max_length=64)] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=_LONGEST_TEXT)] | None = None
    tags: Annotated[list[Tag], Field(max_length=32)] | None = None
    favourite: bool | None = None
    notes: Annotated[str, Field(max_length=_LONGEST_TEXT)] | None = None

    def changes(self) -> dict[str, Any]:
        """Return the fields that were sent; what is empty restores the default."""
        changes = self.model_dump(exclude_unset=True)
        if self.sampling is not None:
            changes["sampling"] = self.sampling.model_dump(exclude_none=True)
        if self.tags is not None:
            changes["tags"] = sorted(set(self.tags))
        for name in ("sampling", "system_prompt", "template_kwargs", "tags", "notes"):
            if name in changes:
                changes[name] = changes[name] or None
        return changes


class ModelSettings(Answer):
    """A model's own settings; null means the server's default."""

    context_length: int | None
    keep_alive_s: float | None
    pin: bool | None
    priority: Priority | None
    max_sequences: int | None
    kv_type: str | None
    tool_parser: str | None
    runtime: str | None
    continue_answers: bool | None
    deterministic: bool | None
    sampling: dict[str, float] | None
    system_prompt: str | None
    template_kwargs: dict[str, JsonValue] | None
    chat_template: str | None
    tags: list[str] | None
    favourite: bool | None
    notes: str | None


class MemoryNeed(Answer):
    """What a model would take; see `router.services.MemoryPreviewView`."""

    fit: Literal["now", "after_unloading", "after_requests", "no"]
    reason: str
    evicts: list[str]
    context_tokens: int
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    needed_bytes: int
    budget_bytes: int
    held_bytes: int
    limit_bytes: int


class CheckedSettings(Answer):
    """The settings that a model would have; `memory` is null while the scheduler is away."""

    id: str
    settings: ModelSettings
    memory: MemoryNeed | None


class RuntimeChoice(Answer):
    """The runtime that the scan chose, and what it found about the other one, empty if none."""

    runtime: str
    reason: str
    alternative: str
    alternative_reason: str


class ModelDetail(ModelFacts):
    """A model with its settings; `duplicates` are ids of models with the same files.

    `runtime_choice` is null for formats with one runtime, `conversion` for models that this server
    did not convert.  `source` is whose folder the files are in.
    """

    source: str
    runtime_choice: RuntimeChoice | None
    conversion: ConversionView | None
    duplicates: list[str]
    settings: ModelSettings


def show_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler of one model, usable or not."""

    async def show_model(request: Request) -> Response:
        view = await named_model(context, request)
        return await _show(management, view)

    return show_model


def change_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that changes a model's settings."""

    async def change_model(request: Request) -> Response:
        view, changes = await _asked_changes(context, request)
        if changes:
            await management.change_settings(view.id, changes)
        return await _show(management, await find_model(context, view.id))

    return change_model


def check_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that checks changes of settings as PATCH does, and stores nothing."""

    async def check_settings(request: Request) -> Response:
        view, changes = await _asked_changes(context, request)
        settings = await management.check_settings(view.id, changes)
        need = await management.preview_memory(view.id, changes)
        return answer(
            CheckedSettings(
                id=view.id, settings=_shown(settings), memory=need and _memory_need(need)
            )
        )

    return check_settings


def _memory_need(need: MemoryPreviewView) -> MemoryNeed:
    facts = asdict(need)
    evicted = facts.pop("evicted")
    return MemoryNeed(
        **facts | {"reason": escaped(need.reason, MAX_ERROR_CHARACTERS)},
        evicts=list(evicted),
        needed_bytes=need.weights_bytes + need.kv_bytes + need.overhead_bytes,
    )


async def _asked_changes(
    context: RouteContext, request: Request
) -> tuple[ModelView, dict[str, Any]]:
    """Return the model and the changes that the body asks for.  Raises RequestError."""
    patch = await read_strict(request, SettingsPatch)
    view = await named_model(context, request)
    asked = patch.context_length
    if asked is not None and 0 < view.context_length < asked:
        raise RequestError(
            f"context_length: {asked} is more than the {view.context_length} tokens that "
            f"{view.id} was trained with.",
            param="context_length",
        )
    return view, patch.changes()


def load_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that answers once the model is in memory."""
    return _action_endpoint(context, management, management.load)


def unload_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that answers once the model is out of memory."""
    return _action_endpoint(context, management, management.unload)


class ModelPlace(StrictBody):
    """Where a missing model's file or folder is now: an absolute path in a model folder."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]


def locate_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that gives a missing model its files at another place."""

    async def locate_model(request: Request) -> Response:
        body = await read_strict(request, ModelPlace)
        view = await named_model(context, request)
        await management.locate_model(view.id, body.path)
        return await _show(management, await find_model(context, view.id))

    return locate_model


def _action_endpoint(
    context: RouteContext, management: Management, act: Callable[[str], Awaitable[None]]
) -> Endpoint:
    async def act_on_model(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        view = await named_model(context, request)
        await act(view.id)
        return await _show(management, await find_model(context, view.id))

    return act_on_model


async def named_model(context: RouteContext, request: Request) -> ModelView:
    """Return the model in the request's path.  Raises what `find_model` does."""
    view = await find_model(context, str(request.path_params["model_id"]))
    record_of(request.scope).model_id = view.id
    return view


async def _show(management: Management, view: ModelView) -> Response:
    settings = await management.settings_of([view.id])
    return answer(describe(view, settings.get(view.id)))


def describe(view: ModelView, settings: SettingsView | None) -> ModelDetail:
    """Return the model as `/api/models` shows it."""
    choice = view.runtime_choice
    return ModelDetail(
        **model_facts(view),
        source=view.source,
        runtime_choice=choice
        and RuntimeChoice(
            **{key: escaped(text, MAX_ERROR_CHARACTERS) for key, text in asdict(choice).items()}
        ),
        conversion=view.conversion,
        duplicates=list(view.duplicates),
        settings=_shown(settings or SettingsView()),
    )


def _shown(settings: SettingsView) -> ModelSettings:
    return ModelSettings(**asdict(settings))
