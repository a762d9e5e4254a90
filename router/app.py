"""The HTTP application: routes, middleware and error handlers over `Services`."""

from fastapi import FastAPI
from starlette.middleware import Middleware

from core.metrics import Metrics
from core.settings import Settings
from router.api.routes import api_routes
from router.context import IgnoredNames, Pacing, RouteContext
from router.http.access import AccessGuard
from router.http.drain import Drain
from router.http.errors import RequestBoundary, install_error_handlers
from router.http.guards import (
    BodyLimit,
    ContentTypeGuard,
    DrainGuard,
    HeaderGuard,
    OriginGuard,
)
from router.http.rate_limits import RateGuard
from router.openapi import describe_routes, description_route
from router.route import add_routes
from router.services import Services
from router.status import installed_version, status_routes
from router.v1.routes import inference_routes


def create_app(
    services: Services,
    *,
    metrics: Metrics | None = None,
    pacing: Pacing | None = None,
    drain: Drain | None = None,
) -> FastAPI:
    """Build the application.

    `metrics` may hold collectors of other parts; `drain` counts the running requests.  Raises
    ValueError if a setting of allowed origins is not a valid origin.
    """
    metrics = metrics or Metrics()
    guarded = (services.settings, metrics)
    drain = drain or Drain()
    requests = None if services.events is None else services.events.requests
    app = FastAPI(
        title="Impetus",
        version=installed_version(),
        docs_url=None,
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(RequestBoundary, metrics, requests),
            Middleware(HeaderGuard, *guarded, services.credentials),
            Middleware(OriginGuard, *guarded),
            Middleware(BodyLimit, *guarded),
            Middleware(AccessGuard, *guarded, services.management_token, services.credentials),
            *_rate_guard(services.settings, metrics),
            Middleware(ContentTypeGuard, *guarded),
            Middleware(DrainGuard, *guarded, drain),
        ],
    )
    install_error_handlers(app, metrics)
    context = RouteContext(services, metrics, IgnoredNames(metrics), pacing or Pacing())
    # Routes are tried in this order.
    routes = [
        *inference_routes(context),
        *status_routes(context, drain),
        *api_routes(context, drain),
        description_route(app),
    ]
    add_routes(app, routes)
    describe_routes(app, routes)
    # A wrong setting fails at start, not at the first request.
    app.build_middleware_stack()
    return app


def _rate_guard(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Return the rate limits, or nothing, which costs nothing, if there are none."""
    if settings.rate_limit_requests is None and settings.rate_limit_tokens is None:
        return []
    return [Middleware(RateGuard, settings, metrics)]
