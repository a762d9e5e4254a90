"""Every error in OpenAI's envelope, and the request id on every response."""

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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import ImpetusError, NotFound, RequestError
from core.metrics import Metrics
from router.context import RequestRecord, keep_server_send, record_of

_logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499


def error_body(error: ImpetusError) -> bytes:
    """Return the envelope as ASCII JSON, which can hold any text."""
    return json.dumps(error.envelope(), separators=(",", ":")).encode("ascii")


def error_response(
    error: ImpetusError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return `error` as a response; `status` replaces the error's own (405, 415, 431)."""
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        all_headers["www-authenticate"] = "Bearer"
    return Response(
        error_body(error),
        status_code=error.status if status is None else status,
        headers=all_headers,
        media_type="application/json",
    )


def internal_error(record: RequestRecord) -> ImpetusError:
    """Return what a user is told of a bug."""
    return ImpetusError(f"internal error, request id {record.request_id}")


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Make every error that a route raises an envelope."""

    async def on_impetus_error(request: Request, error: Exception) -> Response:
        del request
        if not isinstance(error, ImpetusError):
            raise error
        metrics.errors.labels(error.code).inc()
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        known: ImpetusError
        if error.status_code == 404:
            known = NotFound(f"There is nothing at {request.scope['path'][:200]!r}.")
        elif error.status_code == 405:
            known = RequestError(f"The method {request.method[:20]} is not allowed here.")
        else:
            known = RequestError(str(error.detail))
        metrics.errors.labels(known.code).inc()
        return error_response(known, status=error.status_code, headers=error.headers)

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


class RequestBoundary:
    """Outermost middleware: request id, bugs as 500, and the request's metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; a bug's traceback goes to the log only."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        keep_server_send(scope, send)
        status = 0
        started_at = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        self._metrics.in_flight.inc()
        try:
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
            self._metrics.requests.labels(
                endpoint, record.model_id, str(status or CLIENT_CLOSED_REQUEST)
            ).inc()
            self._metrics.request_duration.labels(endpoint).observe(time.monotonic() - started_at)
