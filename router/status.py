"""Routes of the server itself: its address, health, readiness and metrics."""

from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, TypeAlias

from pydantic import BaseModel
from starlette.responses import Response

from core.errors import Unavailable
from core.metrics import CONTENT_TYPE
from router.context import RouteContext
from router.http.access import Access
from router.http.drain import Drain
from router.job_service import Answer
from router.route import Route

Endpoint: TypeAlias = Callable[[], Awaitable[Response]]


class Health(Answer):
    """That the process responds, or that requests are accepted, as llama.cpp says it."""

    status: Literal["ok"] = "ok"


class Readiness(Answer):
    """That requests are accepted."""

    status: Literal["ready"] = "ready"


class ServerLinks(Answer):
    """Paths of the server."""

    models: str = "/v1/models"
    health: str = "/healthz"
    metrics: str = "/metrics"


class ServerInfo(Answer):
    """What the server is, and the base URL for clients of OpenAI's API."""

    name: Literal["impetus"] = "impetus"
    version: str
    base_url: str
    links: ServerLinks = ServerLinks()


def status_routes(context: RouteContext, drain: Drain) -> Sequence[Route]:
    """Return the routes; `/health` and `/v1/health` are llama.cpp's names of `/readyz`."""
    everyone = Access.OPEN
    ok, ready = (_readiness_endpoint(context, drain, one) for one in (Health(), Readiness()))
    metrics = _metrics_endpoint(context)
    return [
        Route(Access.INFERENCE, "GET", "/", _root_endpoint(context), answer=ServerInfo),
        Route(Access.READ, "GET", "/metrics", metrics, answer=str, media_type="text/plain"),
        Route(everyone, "GET", "/healthz", _show_health, answer=Health),
        Route(everyone, "GET", "/readyz", ready, answer=Readiness),
        Route(everyone, "GET", "/health", ok, answer=Health, name="showHealthOfLlamaCpp"),
        Route(everyone, "GET", "/v1/health", ok, answer=Health, name="showHealthOfVersion1"),
    ]


def installed_version() -> str:
    """Return the server's version, or `unknown` if it runs without being installed."""
    try:
        return version("impetus")
    except PackageNotFoundError:
        return "unknown"


def _root_endpoint(context: RouteContext) -> Endpoint:
    async def show_server() -> Response:
        base_url = context.services.settings.base_url
        return _answer(ServerInfo(version=installed_version(), base_url=base_url))

    return show_server


async def _show_health() -> Response:
    return _answer(Health())


def _answer(content: BaseModel) -> Response:
    return Response(content.model_dump_json(), media_type="application/json")


def _readiness_endpoint(context: RouteContext, drain: Drain, content: BaseModel) -> Endpoint:
    async def show_readiness() -> Response:
        if drain.is_on:
            raise drain.refusal()
        reason = await context.services.health.not_ready_because()
        if reason:
            raise Unavailable(reason, retry_after_s=1)
        return _answer(content)

    return show_readiness


def _metrics_endpoint(context: RouteContext) -> Endpoint:
    async def show_metrics() -> Response:
        await context.services.telemetry.refresh()
        return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return show_metrics
