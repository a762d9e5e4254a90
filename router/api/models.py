"""`/api/models`: each model's own settings, loading and unloading."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.errors import RequestError
from core.text import escaped
from router.context import RouteContext, record_of
from router.requests.limits import MAX_ERROR_CHARACTERS, MAX_INT32
from router.requests.strict_body import EmptyBody, StrictBody, read_strict
from router.services import Management, ModelView, Priority, SettingsView
from router.v1.models import find_model, model_object

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

_YEAR_S = 366 * 24 * 3600


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


def list_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler of the list."""

    async def list_models(request: Request) -> Response:
        del request
        views = await context.services.catalog.models()
        settings = await management.settings_of([view.id for view in views])
        models = [_described(view, settings.get(view.id)) for view in views]
        return _answer({"models": models})

    return list_models


def show_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler of one model, usable or not."""

    async def show_model(request: Request) -> Response:
        view = await _named_model(context, request)
        return await _show(management, view)

    return show_model


def change_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that changes a model's settings."""

    async def change_model(request: Request) -> Response:
        patch = await read_strict(request, SettingsPatch)
        view = await _named_model(context, request)
        asked = patch.context_length
        if asked is not None and 0 < view.context_length < asked:
            raise RequestError(
                f"context_length: {asked} is more than the {view.context_length} tokens that "
                f"{view.id} was trained with.",
                param="context_length",
            )
        changes = patch.model_dump(exclude_unset=True)
        if changes:
            await management.change_settings(view.id, changes)
        return await _show(management, await find_model(context, view.id))

    return change_model


def load_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that answers once the model is in memory."""
    return _action_endpoint(context, management, management.load)


def unload_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that answers once the model is out of memory."""
    return _action_endpoint(context, management, management.unload)


def _action_endpoint(
    context: RouteContext, management: Management, act: Callable[[str], Awaitable[None]]
) -> Endpoint:
    async def act_on_model(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        view = await _named_model(context, request)
        await act(view.id)
        return await _show(management, await find_model(context, view.id))

    return act_on_model


async def _named_model(context: RouteContext, request: Request) -> ModelView:
    view = await find_model(context, str(request.path_params["model_id"]))
    record_of(request.scope).model_id = view.id
    return view


async def _show(management: Management, view: ModelView) -> Response:
    settings = await management.settings_of([view.id])
    return _answer(_described(view, settings.get(view.id)))


def _described(view: ModelView, settings: SettingsView | None) -> dict[str, Any]:
    choice = view.runtime_choice
    return {
        **model_object(view),
        "runtime_choice": choice
        and {key: escaped(text, MAX_ERROR_CHARACTERS) for key, text in asdict(choice).items()},
        "settings": asdict(settings or SettingsView()),
    }


def _answer(content: dict[str, Any]) -> Response:
    return Response(to_json(content), media_type="application/json")
