"""Routes of the server itself: its address, health, readiness and metrics."""

from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from starlette.responses import JSONResponse, Response

from core.errors import Unavailable
from core.metrics import CONTENT_TYPE
from router.context import RouteContext
from router.http.access import Access
from router.http.drain import Drain
from router.route import Route


def status_routes(context: RouteContext, drain: Drain) -> Sequence[Route]:
    """Return the routes; `/health` and `/v1/health` are llama.cpp's names of `/readyz`."""
    everyone = Access.OPEN
    ok = _readiness_endpoint(context, drain, "ok")
    return [
        Route(Access.INFERENCE, "GET", "/", _root_endpoint(context)),
        Route(Access.READ, "GET", "/metrics", _metrics_endpoint(context)),
        Route(everyone, "GET", "/healthz", _healthz),
        Route(everyone, "GET", "/readyz", _readiness_endpoint(context, drain, "ready")),
        Route(everyone, "GET", "/health", ok),
        Route(everyone, "GET", "/v1/health", ok),
    ]


def installed_version() -> str:
    """Return the server's version, or `unknown` if it runs without being installed."""
    try:
        return version("impetus")
    except PackageNotFoundError:
        return "unknown"


def _root_endpoint(context: RouteContext) -> Callable[[], Awaitable[Response]]:
    async def describe() -> Response:
        return JSONResponse(
            {
                "name": "impetus",
                "version": installed_version(),
                "base_url": context.services.settings.base_url,
                "links": {"models": "/v1/models", "health": "/healthz", "metrics": "/metrics"},
            }
        )

    return describe


async def _healthz() -> Response:
    return JSONResponse({"status": "ok"})


def _readiness_endpoint(
    context: RouteContext, drain: Drain, status: str
) -> Callable[[], Awaitable[Response]]:
    async def show_readiness() -> Response:
        if drain.is_on:
            raise drain.refusal()
        reason = await context.services.health.not_ready_because()
        if reason:
            raise Unavailable(reason, retry_after_s=1)
        return JSONResponse({"status": status})

    return show_readiness


def _metrics_endpoint(context: RouteContext) -> Callable[[], Awaitable[Response]]:
    async def show_metrics() -> Response:
        await context.services.telemetry.refresh()
        return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return show_metrics
