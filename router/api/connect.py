"""`/api/connect`: sets clients up for this server, and checks their connection."""

import asyncio
import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from core.errors import ModelNotFound, NotFound, RequestError
from router.answers.event_feed import unless_disconnected
from router.api.answer import Endpoint, answer
from router.clients.answers import (
    ClientList,
    ClientModel,
    ClientSetUp,
    ClientView,
    WrittenSetUp,
)
from router.clients.check import LIMIT_S, Outcome, check_model_list, checked, checks_of
from router.clients.choice import best_model, fit_of, named_model, rank
from router.clients.client import Client
from router.clients.clients import CLIENTS
from router.clients.installed import TRACES, installed_path
from router.clients.problems import ConnectError
from router.clients.setup import (
    PLACEHOLDER_KEY,
    check_answer,
    client_paths,
    language_of,
    level_of,
    shown_files,
    steps_of,
    write_files,
)
from router.clients.target import Model, Target, normal_url
from router.context import NAME_LIMIT, USABLE_STATES, RouteContext
from router.http.access import allowed_scopes
from router.http.guards import header_values, is_key_required
from router.requests.query import Query, read_query
from router.requests.strict_body import StrictBody, read_strict
from router.services import ModelView

_MOST_MODELS = 100
_WILDCARDS = ("0.0.0.0", "::")

_Name = Annotated[str, Field(min_length=1, max_length=NAME_LIMIT)]
# Only what may stand in a shell's command without quotes.
_Url = Annotated[str, Field(max_length=300, pattern=r"^https?://[A-Za-z0-9.:/_~%\[\]-]+$")]
_Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~+/=-]{1,512}$")]


class SetUpQuery(Query):
    """The model, by default the best one, and the server's address as the client sees it."""

    model: _Name | None = None
    url: _Url | None = None


class SetUpBody(StrictBody):
    """What to write; `key` is the API key for the client, if the server needs one."""

    model: _Name | None = None
    url: _Url | None = None
    key: _Key | None = None


class CheckBody(StrictBody):
    """What to check; without `key` it is that of the request."""

    model: _Name | None = None
    key: _Key | None = None


def clients_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler of the list."""

    async def list_clients(request: Request) -> Response:
        del request
        views = await context.services.catalog.models()
        return answer(ClientList(clients=await asyncio.to_thread(_client_views, views)))

    return list_clients


def set_up_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler that shows how a client is set up; nothing is written."""

    async def show_client(request: Request) -> Response:
        name, client = _client_of(request)
        query = read_query(request, SetUpQuery)
        model = await _model_for(context, name, query.model)
        target = _target(context, request, query.url, None)
        is_manager = "manage" in allowed_scopes(request.scope)
        with _refusals():
            changes = client.changes(target, model)
            files = await asyncio.to_thread(shown_files, changes, is_manager=is_manager)
            text = None if client.text is None else client.text(target, model)
        return answer(
            ClientSetUp(
                client=name,
                title=client.title,
                model=model.id,
                level=level_of(model.level),
                reasons=list(model.reasons),
                context_tokens=model.context_tokens,
                url=target.base_url,
                needs_key=bool(target.key),
                files=files,
                text=text,
                language=language_of(text),
                steps=steps_of(client, target),
            ),
            is_private=True,
        )

    return show_client


def write_client_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler that writes a client's files, one call at a time."""
    lock = asyncio.Lock()

    async def write_client(request: Request) -> Response:
        name, client = _client_of(request)
        body = await read_strict(request, SetUpBody)
        model = await _model_for(context, name, body.model)
        target = _target(context, request, body.url, body.key)
        with _refusals():
            changes = client.changes(target, model)
            if not changes:
                raise ConnectError(
                    f"{client.title} has no file that could be written; copy the text of "
                    f"GET /api/connect/{name}."
                )
            async with lock:
                files = await asyncio.to_thread(write_files, changes)
        steps = steps_of(client, target)
        return answer(
            WrittenSetUp(client=name, model=model.id, url=target.base_url, files=files, steps=steps)
        )

    return write_client


def check_client_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler that asks this server what a client would, one check at a time.

    Each step ends within `LIMIT_S` seconds, and all of them when the caller disconnects.
    """
    lock = asyncio.Lock()

    async def check_client(request: Request) -> Response:
        name, client = _client_of(request)
        body = await read_strict(request, CheckBody)
        model = await _model_for(context, name, body.model)
        key = body.key or _key_of(request)
        cookies = [] if key else header_values(request.scope, b"cookie")
        target = Target(f"{_own_root(context, request)}/v1", key)

        async def run() -> list[Outcome]:
            # A session counts for pages of this server alone, which the guard found this one to be.
            headers = [(b"sec-fetch-site", b"same-origin")] if cookies else []
            headers += [(b"cookie", cookie) for cookie in cookies]
            # A proxy of the environment could not reach this machine's loopback.
            async with (
                lock,
                httpx.AsyncClient(headers=headers, timeout=LIMIT_S, trust_env=False) as http,
            ):
                checks = [("model list", check_model_list), *checks_of(client.wire, model)]
                return [await checked(step, check(http, target, model)) for step, check in checks]

        outcomes = await unless_disconnected(run(), request.receive) or []
        return answer(check_answer(name, model, outcomes, key))

    return check_client


def _client_of(request: Request) -> tuple[str, Client]:
    """Return the client that the path names.  Raises NotFound."""
    name = str(request.path_params["client"])
    if name not in CLIENTS:
        raise NotFound(
            f"There is no client {name[:100]!r}; those that can be set up are "
            f"{', '.join(sorted(CLIENTS))}."
        )
    return name, CLIENTS[name]


async def _model_for(context: RouteContext, client: str, wanted: str | None) -> Model:
    """Return the model that is wanted, or else the best one.

    Raises RequestError if none suits the client, and what `Catalog.resolve` raises.
    """
    views = await context.services.catalog.models()
    entries = [_entry(view) for view in views if view.state in USABLE_STATES]
    if wanted is not None:
        model = named_model(entries, client, wanted)
        if model is None:
            view = await context.services.catalog.resolve(wanted)
            model = named_model([_entry(view)], client, view.id)
        if model is None:
            raise ModelNotFound.of(wanted, [view.id for view in views])
        return model
    model = await asyncio.to_thread(best_model, entries, client)
    if model is None:
        raise RequestError(
            f"No model of this server suits {client}; GET /api/connect says what each lacks. Add "
            "another model, or name one in `model`.",
            param="model",
        )
    return model


def _entry(view: ModelView) -> Mapping[str, Any]:
    """Return what the choice of a model reads, as in `/v1/models`."""
    return {
        "id": view.id,
        "aliases": view.aliases,
        "format": view.format,
        "capabilities": view.capabilities,
        "parameters": view.parameters,
        "max_model_len": view.max_model_len,
        "context_length": view.context_length,
        "compatibility": {
            client: {"level": fit.level, "reasons": fit.reasons}
            for client, fit in view.compatibility.items()
        },
    }


def _client_views(views: Sequence[ModelView]) -> list[ClientView]:
    entries = [_entry(view) for view in views if view.format != "echo"]
    usable = {view.id for view in views if view.state in USABLE_STATES}
    found = []
    for name, client in sorted(CLIENTS.items()):
        path = installed_path(name)
        best = best_model([entry for entry in entries if entry["id"] in usable], name)
        ranked = heapq.nlargest(_MOST_MODELS, entries, key=lambda entry: rank(entry, name))
        found.append(
            ClientView(
                client=name,
                title=client.title,
                api=client.wire,
                is_installed=path is not None if name in TRACES else None,
                found="" if path is None else str(path),
                files=client_paths(client),
                recommended=None if best is None else best.id,
                models=[_client_model(entry, name) for entry in ranked],
            )
        )
    return found


def _client_model(entry: Mapping[str, Any], client: str) -> ClientModel:
    fit = fit_of(entry, client)
    return ClientModel(
        model=entry["id"], level=level_of(fit["level"]), reasons=list(fit["reasons"])
    )


def _target(context: RouteContext, request: Request, url: str | None, key: str | None) -> Target:
    """Return the server as a client is to see it.  Raises RequestError for an unusable URL."""
    is_key_needed = is_key_required(context.services.settings, context.services.credentials)
    with _refusals("url"):
        base_url = normal_url(url or _own_root(context, request))
    return Target(base_url, key or (PLACEHOLDER_KEY if is_key_needed else ""))


def _own_root(context: RouteContext, request: Request) -> str:
    """Return this server's address on this machine, with the port that the request came to."""
    settings = context.services.settings
    _, port = request.scope.get("server") or ("", None)
    host = "127.0.0.1" if settings.host in _WILDCARDS else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{port or settings.port}"


def _key_of(request: Request) -> str:
    """Return the API key that a request was sent with; empty without one."""
    headers = request.headers
    scheme, _, text = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key", "") or (text.strip() if scheme.lower() == "bearer" else "")


@contextmanager
def _refusals(param: str | None = None) -> Iterator[None]:
    """Raise what cannot be set up as a RequestError."""
    try:
        yield
    except ConnectError as problem:
        raise RequestError(str(problem), param=param) from problem
