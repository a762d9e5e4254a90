"""The HTTP application: routes, middleware and error handlers over `Services`."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from core.errors import Unavailable
from core.metrics import CONTENT_TYPE, Metrics
from core.settings import Settings
from router.api.aliases import (
    AliasTarget,
    aliases_endpoint,
    remove_alias_endpoint,
    set_alias_endpoint,
)
from router.api.bin import bin_endpoint, delete_endpoint, purge_endpoint, restore_endpoint
from router.api.decisions import decisions_endpoint
from router.api.downloads import (
    DownloadLimitsPatch,
    DownloadRequest,
    change_limits_endpoint,
    download_endpoint,
    downloads_endpoint,
    limits_endpoint,
)
from router.api.drain import drain_endpoint
from router.api.hub import (
    ReadmeQuery,
    RepositoryQuery,
    SearchQuery,
    TokenBody,
    readme_endpoint,
    remove_token_endpoint,
    repository_endpoint,
    search_endpoint,
    store_token_endpoint,
    token_endpoint,
)
from router.api.jobs import (
    JobMove,
    job_action_endpoint,
    job_endpoint,
    job_move_endpoint,
    jobs_endpoint,
)
from router.api.keys import (
    NewKey,
    create_key_endpoint,
    list_keys_endpoint,
    revoke_key_endpoint,
)
from router.api.models import (
    SettingsPatch,
    change_endpoint,
    check_endpoint,
    list_endpoint,
    load_endpoint,
    show_endpoint,
    unload_endpoint,
)
from router.api.session import (
    SessionCode,
    close_session_endpoint,
    link_endpoint,
    open_session_endpoint,
    show_session_endpoint,
)
from router.context import IgnoredNames, Pacing, RouteContext
from router.http.access import Access, AccessGuard, access_of
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
from router.hub_service import Hub, HubReadme, HubRepositoryAnswer, HubResults, HubTokenAnswer
from router.job_service import DownloadLimitsView, JobDetail, JobList, Jobs
from router.openapi import describe_routes
from router.requests.strict_body import EmptyBody
from router.services import Credentials, Management, Services
from router.v1.chat.endpoint import chat_endpoint
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest, completion_endpoint
from router.v1.embeddings import EmbeddingRequest, embedding_endpoint
from router.v1.messages.endpoints import count_tokens_endpoint, messages_endpoint
from router.v1.messages.request import MessagesPromptRequest, MessagesRequest
from router.v1.messages.threads import ThreadStore
from router.v1.models import model_endpoint, models_endpoint
from router.v1.rerank import PATHS as RERANK_PATHS
from router.v1.rerank import RerankRequest, rerank_endpoint
from router.v1.responses.endpoints import input_tokens_endpoint, responses_endpoint
from router.v1.responses.request import ResponsesRequest
from router.v1.responses.store import ResponseStore
from router.v1.responses.stored import (
    cancel_response_endpoint,
    delete_response_endpoint,
    input_items_endpoint,
    stored_response_endpoint,
)
from router.v1.tokenize import (
    DetokenizeRequest,
    TemplateRequest,
    TokenizeRequest,
    detokenize_endpoint,
    template_endpoint,
    tokenize_endpoint,
)

_HUB_MODEL = "/api/hub/models/{owner}/{name}"
_JOB_ACTIONS = ("pause", "resume", "cancel")
_BODIES: Mapping[tuple[str, str], type[BaseModel]] = {
    ("POST", "/v1/chat/completions"): ChatRequest,
    ("POST", "/v1/completions"): CompletionRequest,
    ("POST", "/v1/embeddings"): EmbeddingRequest,
    **{("POST", path): RerankRequest for path in RERANK_PATHS},
    ("POST", "/v1/messages"): MessagesRequest,
    ("POST", "/v1/messages/count_tokens"): MessagesPromptRequest,
    ("POST", "/v1/responses"): ResponsesRequest,
    ("POST", "/v1/responses/input_tokens"): ResponsesRequest,
    ("POST", "/v1/responses/{response_id}/cancel"): EmptyBody,
    ("POST", "/tokenize"): TokenizeRequest,
    ("POST", "/detokenize"): DetokenizeRequest,
    ("POST", "/apply-template"): TemplateRequest,
    ("PATCH", "/api/models/{model_id:path}"): SettingsPatch,
    ("POST", "/api/models/{model_id:path}/check"): SettingsPatch,
    ("POST", "/api/models/{model_id:path}/load"): EmptyBody,
    ("POST", "/api/models/{model_id:path}/unload"): EmptyBody,
    ("PUT", "/api/aliases/{alias:path}"): AliasTarget,
    ("POST", "/api/bin/{bin_id}/restore"): EmptyBody,
    ("POST", "/api/drain"): EmptyBody,
    ("POST", "/api/keys"): NewKey,
    ("POST", "/api/session"): SessionCode,
    ("POST", "/api/downloads"): DownloadRequest,
    ("POST", "/api/hub/token"): TokenBody,
    ("PATCH", "/api/downloads/limits"): DownloadLimitsPatch,
    **{("POST", f"/api/jobs/{{job_id}}/{act}"): EmptyBody for act in _JOB_ACTIONS},
    ("POST", "/api/jobs/{job_id}/move"): JobMove,
}
_ANSWERS: Mapping[tuple[str, str], type[BaseModel]] = {
    ("GET", "/api/downloads"): JobList,
    ("POST", "/api/downloads"): JobDetail,
    ("GET", "/api/downloads/limits"): DownloadLimitsView,
    ("PATCH", "/api/downloads/limits"): DownloadLimitsView,
    ("GET", "/api/hub/search"): HubResults,
    **{(method, "/api/hub/token"): HubTokenAnswer for method in ("GET", "POST", "DELETE")},
    ("GET", _HUB_MODEL): HubRepositoryAnswer,
    ("GET", f"{_HUB_MODEL}/readme"): HubReadme,
    ("GET", "/api/jobs"): JobList,
    ("GET", "/api/jobs/{job_id}"): JobDetail,
    **{("POST", f"/api/jobs/{{job_id}}/{act}"): JobDetail for act in (*_JOB_ACTIONS, "move")},
}
_QUERIES: Mapping[tuple[str, str], type[BaseModel]] = {
    ("GET", "/api/hub/search"): SearchQuery,
    ("GET", _HUB_MODEL): RepositoryQuery,
    ("GET", f"{_HUB_MODEL}/readme"): ReadmeQuery,
}


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
    app = FastAPI(
        title="Impetus",
        version=_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(RequestBoundary, metrics),
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
    _add_inference_routes(app, context)
    _add_public_routes(app, context, drain)
    if services.management is not None:
        _add_management_routes(app, context, services.management)
        _add_route(app, Access.MANAGE, "/api/drain", drain_endpoint(drain), "POST")
    if services.jobs is not None:
        _add_job_routes(app, services.jobs)
    if services.hub is not None:
        _add_hub_routes(app, services.hub)
    if services.credentials is not None:
        _add_key_routes(app, services.settings, services.credentials)
    describe_routes(app, _BODIES, _ANSWERS, _QUERIES)
    # A wrong setting fails at start, not at the first request.
    app.build_middleware_stack()
    return app


def _rate_guard(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Return the rate limits, or nothing, which costs nothing, if there are none."""
    if settings.rate_limit_requests is None and settings.rate_limit_tokens is None:
        return []
    return [Middleware(RateGuard, settings, metrics)]


def _add_inference_routes(app: FastAPI, context: RouteContext) -> None:
    add = partial(_add_route, app, Access.INFERENCE)
    # Routes are tried in this order: the most used come first.
    add("/v1/chat/completions", chat_endpoint(context), "POST")
    add("/v1/completions", completion_endpoint(context), "POST")
    settings = context.services.settings
    threads = ThreadStore(
        max_count=settings.stored_responses, max_bytes=settings.stored_responses_bytes
    )
    add("/v1/messages", messages_endpoint(context, threads), "POST")
    add("/v1/embeddings", embedding_endpoint(context), "POST")
    for path in RERANK_PATHS:
        add(path, rerank_endpoint(context), "POST")
    add("/v1/messages/count_tokens", count_tokens_endpoint(context, threads), "POST")
    store = ResponseStore(
        max_count=settings.stored_responses, max_bytes=settings.stored_responses_bytes
    )
    add("/v1/responses", responses_endpoint(context, store), "POST")
    add("/v1/responses/input_tokens", input_tokens_endpoint(context, store), "POST")
    add("/v1/responses/{response_id}/input_items", input_items_endpoint(store))
    add("/v1/responses/{response_id}/cancel", cancel_response_endpoint(store), "POST")
    add("/v1/responses/{response_id}", stored_response_endpoint(store))
    add("/v1/responses/{response_id}", delete_response_endpoint(store), "DELETE")
    add("/tokenize", tokenize_endpoint(context), "POST")
    add("/detokenize", detokenize_endpoint(context), "POST")
    add("/apply-template", template_endpoint(context), "POST")
    add("/v1/models", models_endpoint(context))
    add("/v1/models/{model_id:path}", model_endpoint(context))
    add("/", _root_endpoint(context))
    _add_route(app, Access.READ, "/metrics", _metrics_endpoint(context))


def _add_public_routes(app: FastAPI, context: RouteContext, drain: Drain) -> None:
    add = partial(_add_route, app, Access.OPEN)
    add("/healthz", _healthz)
    add("/readyz", _readiness_endpoint(context, drain, "ready"))
    # llama.cpp's names; /health is vLLM's as well.
    for path in ("/health", "/v1/health"):
        add(path, _readiness_endpoint(context, drain, "ok"))


def _add_management_routes(app: FastAPI, context: RouteContext, management: Management) -> None:
    read = partial(_add_route, app, Access.READ)
    manage = partial(_add_route, app, Access.MANAGE)
    one_model = "/api/models/{model_id:path}"
    read("/api/models", list_endpoint(context, management))
    manage(f"{one_model}/check", check_endpoint(context, management), "POST")
    manage(f"{one_model}/load", load_endpoint(context, management), "POST")
    manage(f"{one_model}/unload", unload_endpoint(context, management), "POST")
    read(one_model, show_endpoint(context, management))
    manage(one_model, change_endpoint(context, management), "PATCH")
    manage(one_model, delete_endpoint(context, management), "DELETE")
    read("/api/bin", bin_endpoint(management))
    manage("/api/bin/{bin_id}/restore", restore_endpoint(management), "POST")
    manage("/api/bin/{bin_id}", purge_endpoint(management), "DELETE")
    one_alias = "/api/aliases/{alias:path}"
    read("/api/aliases", aliases_endpoint(management))
    manage(one_alias, set_alias_endpoint(context, management), "PUT")
    manage(one_alias, remove_alias_endpoint(management), "DELETE")
    read("/api/decisions", decisions_endpoint(management))


def _add_key_routes(app: FastAPI, settings: Settings, credentials: Credentials) -> None:
    add = partial(_add_route, app, Access.MANAGE)
    add("/api/keys", list_keys_endpoint(credentials))
    add("/api/keys", create_key_endpoint(credentials), "POST")
    add("/api/keys/{key_id}", revoke_key_endpoint(credentials), "DELETE")
    _add_route(app, Access.READ, "/api/session", show_session_endpoint())
    add_open = partial(_add_route, app, Access.OPEN)
    add_open("/api/session", open_session_endpoint(settings, credentials), "POST")
    add_open("/api/session", close_session_endpoint(settings, credentials), "DELETE")
    # Without HEAD: that would use the link up.
    app.add_api_route(
        "/session",
        link_endpoint(settings, credentials),
        methods=["GET"],
        response_model=None,
        tags=[Access.OPEN.value],
    )


def _add_job_routes(app: FastAPI, jobs: Jobs) -> None:
    read = partial(_add_route, app, Access.READ)
    manage = partial(_add_route, app, Access.MANAGE)
    read("/api/downloads", downloads_endpoint(jobs))
    manage("/api/downloads", download_endpoint(jobs), "POST", status=202)
    read("/api/downloads/limits", limits_endpoint(jobs))
    manage("/api/downloads/limits", change_limits_endpoint(jobs), "PATCH")
    read("/api/jobs", jobs_endpoint(jobs))
    one_job = "/api/jobs/{job_id}"
    for name, act in zip(_JOB_ACTIONS, (jobs.pause, jobs.resume, jobs.cancel), strict=True):
        manage(f"{one_job}/{name}", job_action_endpoint(act), "POST")
    manage(f"{one_job}/move", job_move_endpoint(jobs), "POST")
    read(one_job, job_endpoint(jobs))


def _add_hub_routes(app: FastAPI, hub: Hub) -> None:
    read = partial(_add_route, app, Access.READ)
    manage = partial(_add_route, app, Access.MANAGE)
    read("/api/hub/search", search_endpoint(hub))
    read("/api/hub/token", token_endpoint(hub))
    manage("/api/hub/token", store_token_endpoint(hub), "POST")
    manage("/api/hub/token", remove_token_endpoint(hub), "DELETE")
    read(_HUB_MODEL, repository_endpoint(hub))
    read(f"{_HUB_MODEL}/readme", readme_endpoint(hub))


def _add_route(
    app: FastAPI,
    access: Access,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    method: str = "GET",
    *,
    status: int = 200,
) -> None:
    """Add a route; its tag is its access class, `status` that of success.  GET answers HEAD too."""
    if access_of(method, path) is not access:
        raise ValueError(f"{path} would be guarded as {access_of(method, path)}, not as {access}")
    add = partial(
        app.add_api_route,
        path,
        endpoint,
        response_model=None,
        status_code=status,
        tags=[access.value],
    )
    add(methods=[method])
    if method == "GET":
        add(methods=["HEAD"], include_in_schema=False)


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
