"""The HTTP application: routes, middleware and error handlers over `Services`."""

from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from core.errors import Unavailable
from core.metrics import CONTENT_TYPE, Metrics
from router.context import IgnoredNames, Pacing, RouteContext
from router.errors import RequestBoundary, install_error_handlers
from router.security import BodyLimit, ContentTypeGuard, HeaderGuard, KeyGuard, OriginGuard
from router.services import Services
from router.v1.chat import chat_endpoint
from router.v1.completions import completion_endpoint
from router.v1.embeddings import embedding_endpoint
from router.v1.models import model_endpoint, models_endpoint


def create_app(
    services: Services, *, metrics: Metrics | None = None, pacing: Pacing | None = None
) -> FastAPI:
    """Build the application.

    `metrics` is given when somebody else adds to it too.  Raises ValueError for a setting of
    allowed origins that is none.
    """
    metrics = metrics or Metrics()
    guards = (HeaderGuard, OriginGuard, BodyLimit, KeyGuard, ContentTypeGuard)
    app = FastAPI(
        title="Impetus",
        version=_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(RequestBoundary, metrics),
            *(Middleware(guard, services.settings, metrics) for guard in guards),
        ],
    )
    install_error_handlers(app, metrics)
    _add_routes(app, RouteContext(services, metrics, IgnoredNames(metrics), pacing or Pacing()))
    # A wrong setting fails here and not at the first request.
    app.build_middleware_stack()
    return app


def _add_routes(app: FastAPI, context: RouteContext) -> None:
    def add(path: str, endpoint: Callable[..., Awaitable[Response]], method: str = "GET") -> None:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    add("/", _root_endpoint(context))
    add("/healthz", _healthz)
    add("/readyz", _readyz_endpoint(context))
    add("/metrics", _metrics_endpoint(context))
    add("/v1/models", models_endpoint(context))
    add("/v1/models/{model_id:path}", model_endpoint(context))
    add("/v1/chat/completions", chat_endpoint(context), "POST")
    add("/v1/completions", completion_endpoint(context), "POST")
    add("/v1/embeddings", embedding_endpoint(context), "POST")


def _version() -> str:
    try:
        return version("impetus")
    except PackageNotFoundError:
        return "unknown"


def _root_endpoint(context: RouteContext) -> Callable[[], Awaitable[Response]]:
    async def describe() -> Response:
        return JSONResponse(
            {
                "name": "impetus",
                "version": _version(),
                "base_url": context.services.settings.base_url,
                "links": {"models": "/v1/models", "health": "/healthz", "metrics": "/metrics"},
            }
        )

    return describe


async def _healthz() -> Response:
    return JSONResponse({"status": "ok"})


def _readyz_endpoint(context: RouteContext) -> Callable[[], Awaitable[Response]]:
    async def readyz() -> Response:
        reason = await context.services.health.not_ready_because()
        if reason:
            raise Unavailable(reason, retry_after_s=1)
        return JSONResponse({"status": "ready"})

    return readyz


def _metrics_endpoint(context: RouteContext) -> Callable[[], Awaitable[Response]]:
    async def show_metrics() -> Response:
        await context.services.telemetry.refresh()
        return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return show_metrics
