"""`GET /v1/models` and `GET /v1/models/{id}`."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.errors import ModelNotFound
from core.text import escaped
from core.types import Capability
from router.context import NAME_LIMIT, USABLE_STATES, RouteContext
from router.http.errors import is_anthropic
from router.requests.limits import MAX_ERROR_CHARACTERS
from router.services import ModelState, ModelView
from router.v1.model_info import model_info, model_page

# Source: openai/codex, codex-rs, which sends it with its request for models.
_CODEX_VERSION = "client_version"


class ModelFit(BaseModel):
    """How well a client can use a model; `reasons` say what is missing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Literal["ok", "limited", "no"]
    reasons: list[str]


class ModelFacts(BaseModel):
    """What the server knows of a model.

    `context_length` is the trained context, `max_model_len` the granted or estimated one, both in
    tokens.  `reason` says why a model cannot be used.  `created` is in Unix seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["local"]
    name: str
    context_length: int
    max_model_len: int
    format: str
    architecture: str
    quantization: str
    parameters: int
    size_bytes: int
    capabilities: list[Capability]
    state: ModelState
    reason: str
    aliases: list[str]
    license: str
    runtime: str
    runtime_reason: str
    limitations: list[str]
    converted_from: str
    compatibility: dict[str, ModelFit]


class ModelObject(ModelFacts):
    """A model; `alias_of`, the model's id, is sent with the entry of an alias alone."""

    alias_of: str = ""


class ModelPage(BaseModel):
    """The models that a request would be served with; `models` is empty, for Codex alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    object: Literal["list"]
    data: list[ModelObject]
    models: list[str] = []


def models_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of the list: models that a request would be served with.

    Clients show it to their users as it is; `/api/models` has all models, with the reasons.
    Aliases of users have entries of their own, so that they can be chosen as well.  Anthropic's
    clients get its fields, and the models that chat.
    """

    async def list_models(request: Request) -> Response:
        views = await context.services.catalog.models()
        usable = list(_with_aliases(view for view in views if view.state in USABLE_STATES))
        if is_anthropic(request.scope):
            chatting = [view for view in usable if Capability.CHAT in view.capabilities]
            found = model_page(chatting, request.query_params)
            return Response(to_json(found), media_type="application/json")
        listed: dict[str, Any] = {
            "object": "list",
            "data": [model_object(view) for view in usable],
        }
        if _CODEX_VERSION in request.query_params:
            # Codex fails without its own list.  What that must hold includes a system prompt,
            # so it is empty: Codex then keeps its own, and the model that is configured.
            listed["models"] = []
        page = ModelPage(**listed)
        return Response(page.model_dump_json(exclude_unset=True), media_type="application/json")

    return list_models


def model_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of one model, usable or not."""

    async def retrieve_model(request: Request) -> Response:
        view = await find_model(context, str(request.path_params["model_id"]))
        if is_anthropic(request.scope):
            return Response(to_json(model_info(view)), media_type="application/json")
        return Response(
            model_object(view).model_dump_json(exclude_unset=True), media_type="application/json"
        )

    return retrieve_model


async def find_model(context: RouteContext, name: str) -> ModelView:
    """Return the model that an id or alias names, usable or not.

    Raises ModelNotFound, and what `Catalog.resolve` raises for a bare name.
    """
    catalog = context.services.catalog
    for view in await catalog.models():
        if name == view.id or name in view.aliases:
            return view
    if len(name) > NAME_LIMIT:
        raise ModelNotFound.of(name, [])
    return await catalog.resolve(name)


def _with_aliases(views: Iterable[ModelView]) -> Iterator[ModelView]:
    """Yield the models and, after each, an entry for each alias other than its bare name."""
    for view in views:
        yield view
        for alias in view.aliases:
            if alias.lower() != view.name:
                yield replace(view, id=alias, aliases=(), alias_of=view.id)


def model_object(view: ModelView) -> ModelObject:
    """Return the model as clients of OpenAI's API see it."""
    alias = {"alias_of": view.alias_of} if view.alias_of else {}
    return ModelObject(**model_facts(view), **alias)


def model_facts(view: ModelView) -> dict[str, Any]:
    """Return the fields of `ModelFacts`."""
    return {
        "id": view.id,
        "object": "model",
        "created": view.created_at,
        "owned_by": "local",
        "name": escaped(view.name),
        "context_length": view.context_length,
        "max_model_len": view.max_model_len,
        "format": view.format,
        "architecture": escaped(view.architecture),
        "quantization": escaped(view.quantization),
        "parameters": view.parameters,
        "size_bytes": view.size_bytes,
        "capabilities": sorted(view.capabilities),
        "state": view.state,
        "reason": escaped(view.reason, MAX_ERROR_CHARACTERS),
        "aliases": list(view.aliases),
        "license": escaped(view.license),
        "runtime": view.runtime,
        "runtime_reason": escaped(view.runtime_reason, MAX_ERROR_CHARACTERS),
        "limitations": [escaped(text, MAX_ERROR_CHARACTERS) for text in view.limitations],
        "converted_from": view.converted_from,
        "compatibility": {
            client: {"level": fit.level, "reasons": list(fit.reasons)}
            for client, fit in view.compatibility.items()
        },
    }
