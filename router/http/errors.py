"""Turns errors into the error envelope of each API; adds request ids and request metrics."""

import json
import logging
import time
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    ImpetusError,
    NotFound,
    RequestError,
    ThreadNotFound,
    ThreadUnsupported,
)
from core.metrics import Metrics, TokenCount, count_tokens_of_this_request
from core.text import escaped
from core.types import JsonValue
from router.context import RequestRecord, keep_server_send, record_of
from router.events.requests import RequestLog
from router.requests.limits import MAX_ERROR_CHARACTERS

_logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499

_ANTHROPIC_PATH = "/v1/messages"
_MODELS_PATH = "/v1/models"
# Source: Anthropic's API reference, "Errors".
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Codes from which Anthropic's SDK recovers.  Source: its `lib/threads/_thread_state.py`.
_DETAILED_CODES = frozenset({ThreadNotFound.code, ThreadUnsupported.code})


def error_body(error: ImpetusError) -> bytes:
    """Return OpenAI's error envelope as ASCII JSON, which can hold any text."""
    envelope = error.envelope()
    envelope["error"]["message"] = shown_message(error)
    return json.dumps(envelope, separators=(",", ":")).encode("ascii")


def shown_message(error: ImpetusError) -> str:
    """Return the error's message for a client: bounded, and without invisible characters.

    Messages may quote names of files and texts of libraries, which nobody has checked.
    """
    message = error.message
    if len(message) <= MAX_ERROR_CHARACTERS and message.isprintable():
        return message
    lines = message[:MAX_ERROR_CHARACTERS].split("\n")
    shown = "\n".join(escaped(line, MAX_ERROR_CHARACTERS) for line in lines)
    return f"{shown}…" if len(message) > MAX_ERROR_CHARACTERS else shown


def anthropic_error_body(error: ImpetusError, record: RequestRecord) -> bytes:
    """Return Anthropic's error envelope as ASCII JSON."""
    message = shown_message(error)
    if isinstance(error, ContextLengthExceeded) and error.context_tokens:
        # Claude Code shortens a conversation when it reads exactly these words.
        message = (
            f"prompt is too long: {error.prompt_tokens} tokens > {error.context_tokens} maximum"
        )
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    if not isinstance(error, EngineFailed):
        kind = _ANTHROPIC_TYPES.get(error.status, kind)
    shown: dict[str, JsonValue] = {"type": kind, "message": message}
    if error.code in _DETAILED_CODES:
        shown["details"] = {"error_code": error.code}
    envelope = {
        "type": "error",
        "error": shown,
        "request_id": record.request_id,
    }
    return json.dumps(envelope, separators=(",", ":")).encode("ascii")


def error_response(
    error: ImpetusError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return `error` as a response; `status` replaces the error's own (405, 415, 431)."""
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["retry-after"] = str(error.retry_after_s)
    if not error.may_retry:
        # Source: OpenAI's and Anthropic's client libraries, which retry every 5xx otherwise.
        all_headers["x-should-retry"] = "false"
    if error.status == 401:
        all_headers["www-authenticate"] = "Bearer"
    return _ErrorResponse(error, error.status if status is None else status, all_headers)


class _ErrorResponse(Response):
    """An error response; the envelope depends on the request's path, so it is built when sent."""

    def __init__(self, error: ImpetusError, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(
            error_body(error), status_code=status, headers=headers, media_type="application/json"
        )
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_anthropic(scope):
            self.body = anthropic_error_body(self._error, record_of(scope))
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def internal_error(record: RequestRecord) -> ImpetusError:
    """Return the error that a user sees for a bug."""
    return ImpetusError(f"internal error, request id {record.request_id}")


def is_anthropic(scope: Scope) -> bool:
    """Return whether a request is one of Anthropic's API.

    It shares the paths of models with OpenAI's; there its clients are told by the header that all
    of them must send.  Source: Anthropic's API reference, "Versions".
    """
    path: str = scope["path"]
    if path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/"):
        return True
    if path != _MODELS_PATH and not path.startswith(f"{_MODELS_PATH}/"):
        return False
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error that a route raises with an envelope."""

    async def on_impetus_error(request: Request, error: Exception) -> Response:
        del request
        if not isinstance(error, ImpetusError):
            raise error
        metrics.errors.labels(error.code).inc()
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        if error.status_code == 405 and not _methods(app, request):
            error = HTTPException(404)
        if request.method == "OPTIONS" and (error.status_code == 405 or _asks_about_all(request)):
            return Response(status_code=204, headers={"allow": _allowed_methods(app, request)})
        known, headers = _http_error(app, request, error)
        metrics.errors.labels(known.code).inc()
        return error_response(known, status=error.status_code, headers=headers)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        del request
        if not isinstance(error, RequestValidationError):
            raise error
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        metrics.errors.labels(RequestError.code).inc()
        return error_response(RequestError(str(first["msg"]), param=param))

    app.add_exception_handler(ImpetusError, on_impetus_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)


def _http_error(
    app: FastAPI, request: Request, error: HTTPException
) -> tuple[ImpetusError, Mapping[str, str] | None]:
    """Return the error and the headers of what the framework raised."""
    if error.status_code == 404:
        path = request.scope["path"]
        return NotFound(f"There is no endpoint at {path[:200]!r}."), error.headers
    if error.status_code == 405:
        allowed, method = _allowed_methods(app, request), request.method[:20]
        message = f"The method {method!r} is not allowed at this path; send {allowed}."
        return RequestError(message), {"allow": allowed}
    return RequestError(str(error.detail)), error.headers


def _asks_about_all(request: Request) -> bool:
    """Return whether the target is `*`, the server as a whole.  Source: RFC 9110, 9.3.7."""
    return bool(request.scope["path"] == "*")


def _allowed_methods(app: FastAPI, request: Request) -> str:
    """Return the methods that the routes at the request's path answer, as `Allow` lists them."""
    return ", ".join(sorted({"OPTIONS", *_methods(app, request)}))


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Return the methods of the routes at the request's path, none for an unknown sub-resource."""
    methods: set[str] = set()
    for route in app.routes:
        match, found = route.matches(request.scope)
        # A name may contain slashes only to be reported whole: no model's name has any.
        is_there = match is not Match.NONE and not any(
            "/" in str(value) for value in found.get("path_params", {}).values()
        )
        if is_there or _asks_about_all(request):
            methods |= set(getattr(route, "methods", None) or ())
    return methods


class RequestBoundary:
    """Outermost middleware: sets the request id, answers bugs with 500, counts requests.

    `requests` is told the end of each.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, requests: RequestLog | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; the traceback of a bug is only logged."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        record.path = scope["path"]
        keep_server_send(scope, send)
        status = 0
        count = TokenCount()
        started_at = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                if is_anthropic(scope):
                    headers["request-id"] = record.request_id
            await send(message)

        self._metrics.in_flight.inc()
        try:
            with count_tokens_of_this_request() as count:
                await self._app(scope, receive, send_with_id)
        except Exception:
            _logger.exception("internal error", extra={"request_id": record.request_id})
            self._metrics.errors.labels(ImpetusError.code).inc()
            if status:
                raise
            await error_response(internal_error(record))(scope, receive, send_with_id)
        finally:
            self._metrics.in_flight.dec()
            endpoint = getattr(scope.get("route"), "path", "")
            duration_s = time.monotonic() - started_at
            self._note_end(endpoint, record, status or CLIENT_CLOSED_REQUEST, duration_s, count)

    def _note_end(
        self,
        endpoint: str,
        record: RequestRecord,
        status: int,
        duration_s: float,
        count: TokenCount,
    ) -> None:
        self._metrics.requests.labels(endpoint, record.model_id, str(status)).inc()
        self._metrics.request_duration.labels(endpoint).observe(duration_s)
        if self._requests is not None:
            self._requests.finish(record.request_id, status, duration_s, count)
