"""Checks of requests as ASGI middleware: headers, origin, body size, content type, drain.

They run in this order: `HeaderGuard`, `OriginGuard`, `BodyLimit`, `router.http.access.AccessGuard`,
`router.http.rate_limits.RateGuard`, `ContentTypeGuard`, `DrainGuard`.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import (
    BodyTooLarge,
    ImpetusError,
    PermissionDenied,
    RequestError,
)
from core.metrics import Metrics
from core.settings import LOOPBACK_HOSTS, Settings
from core.units import KIB, format_bytes
from router.http.drain import Drain
from router.http.errors import error_response
from router.http.own_names import names_this_machine
from router.http.upload_chunks import CHUNK_BYTES, CHUNK_TYPE, is_chunk
from router.services import Credentials

PUBLIC_PATHS = frozenset({"/healthz", "/readyz", "/health", "/v1/health"})
# Also answered while the server is stopping: these report how far it is.
_DRAIN_PATHS = PUBLIC_PATHS | {"/metrics", "/api/drain"}
# Refused then, but not waited for: it ends with the server, and a reader keeps no machine awake.
_EVENTS_PATH = "/api/events"
MAX_HEADER_BYTES = 64 * KIB
MAX_HEADERS = 100

# Source: Ollama, envconfig/config.go: origins of editors and desktop applications.
_APP_SCHEMES = frozenset({"app", "file", "tauri", "vscode-webview", "vscode-file"})
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]{0,30}://[^\s/?#@\\,]{0,260}")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(?:\s*,\s*[A-Za-z0-9-]+){0,99}")
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
CLOSE = {"connection": "close"}
_RATE_HEADERS = [
    name
    for kind in ("requests", "tokens")
    for fact in ("limit", "remaining", "reset")
    for name in (f"x-ratelimit-{fact}-{kind}", f"anthropic-ratelimit-{kind}-{fact}")
]
_EXPOSED = ", ".join(
    [
        *("x-request-id", "request-id", "x-impetus-ignored", "x-impetus-timing", "retry-after"),
        *("upload-offset", "upload-length"),
        *_RATE_HEADERS,
    ]
)


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Return the values of every header called `name` (lower case), in order."""
    return [value for key, value in scope["headers"] if key.lower() == name]


def is_key_required(settings: Settings, credentials: Credentials | None) -> bool:
    """Return whether requests need an API key.

    Other machines always do, also after the last key was revoked.
    """
    if settings.api_key is not None or settings.is_public:
        return True
    return credentials is not None and credentials.has_keys


class Guard:
    """ASGI middleware that may answer instead of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check HTTP requests; pass everything else on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self.guard(scope, receive, send)

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application or answer with an error."""
        await self._app(scope, receive, send)

    def refusal(
        self,
        error: ImpetusError,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Return the error's response and count it."""
        self._metrics.errors.labels(error.code).inc()
        return error_response(error, status=status, headers=headers)


class HeaderGuard(Guard):
    """Limits the headers and accepts only the Host names of this server.

    A foreign web page can make a browser connect here under its own name (DNS rebinding).  While
    a key is required, the machine's host name and the address that was connected to are accepted.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(app, settings, metrics)
        self._credentials = credentials
        names = {*LOOPBACK_HOSTS, settings.host, *settings.allowed_hosts}
        self._names = frozenset(name.lower().strip("[]") for name in names)

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 431, 400 or 403, or pass on."""
        refusal = self._check_size(scope) or self._check_host(scope)
        await (refusal or self._app)(scope, receive, send)

    def _check_size(self, scope: Scope) -> Response | None:
        headers = scope["headers"]
        size = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        if len(headers) <= MAX_HEADERS and size <= MAX_HEADER_BYTES:
            return None
        error = RequestError(
            f"The request has {len(headers)} headers and {format_bytes(size)} of address and "
            f"headers; at most {MAX_HEADERS} and {format_bytes(MAX_HEADER_BYTES)} are accepted."
        )
        return self.refusal(error, status=431, headers=CLOSE)

    def _check_host(self, scope: Scope) -> Response | None:
        hosts = header_values(scope, b"host")
        # HTTP/1.0 has no such header, and health checks use it; browsers send neither.
        is_old = scope.get("http_version") == "1.0" and not header_values(scope, b"origin")
        if is_old and not hosts:
            return None
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            error = RequestError("The request needs exactly one well-formed Host header.")
            return self.refusal(error, headers=CLOSE)
        name = match[1].decode("ascii").lower().strip("[]")
        if name in self._names or (
            is_key_required(self._settings, self._credentials)
            and names_this_machine(name, scope.get("server"))
        ):
            return None
        error_403 = PermissionDenied(
            f"The Host {name!r} is not allowed; add it to IMPETUS_ALLOWED_HOSTS to allow it."
        )
        return self.refusal(error_403, headers=CLOSE)


def normalize_origin(text: str) -> str:
    """Return an origin in the form that browsers send.  Raises ValueError for anything else."""
    origin = text.strip().lower()
    if not origin.endswith("://"):
        origin = origin.rstrip("/")
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(f"not an origin: {text!r} (write https://example.org)")
    if origin.startswith(("http://", "https://")):
        if not urlsplit(origin).hostname or "*" in origin:
            raise ValueError(f"not an origin: {text!r} (patterns are not supported)")
        _ = urlsplit(origin).port
    return origin


class OriginGuard(Guard):
    """Refuses requests of foreign web pages, and answers CORS for allowed origins."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        super().__init__(app, settings, metrics)
        self._allowed = frozenset(normalize_origin(origin) for origin in settings.allowed_origins)

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 before the handler, a preflight, or pass on with the CORS headers."""
        origins = header_values(scope, b"origin")
        if not origins:
            if b"cross-site" in header_values(scope, b"sec-fetch-site"):
                await self._foreign("another site")(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        origin = origins[0].decode("latin-1")
        if len(origins) > 1 or not self._is_allowed(origin, scope):
            await self._foreign(origin[:100])(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and header_values(scope, b"access-control-request-method"):
            await _preflight(origin, scope)(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["access-control-allow-origin"] = origin
                headers["access-control-expose-headers"] = _EXPOSED
                headers.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, send_with_cors)

    def _foreign(self, origin: str) -> Response:
        error = PermissionDenied(
            f"Pages from {origin!r} may not call this server; add the origin to "
            "IMPETUS_ALLOWED_ORIGINS to allow it."
        )
        return self.refusal(error, headers={**CLOSE, "vary": "Origin"})

    def _is_allowed(self, origin: str, scope: Scope) -> bool:
        try:
            origin = normalize_origin(origin)
        except ValueError:
            return False
        if origin in self._allowed:
            return True
        parts = urlsplit(origin)
        if parts.scheme in _APP_SCHEMES:
            return True
        if parts.scheme not in ("http", "https"):
            return False
        own = header_values(scope, b"host")[0].decode("latin-1").lower()
        return parts.hostname in LOOPBACK_HOSTS or parts.netloc == own


def _preflight(origin: str, scope: Scope) -> Response:
    headers = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE",
        "access-control-max-age": "600",
        "vary": "Origin",
    }
    asked = b", ".join(header_values(scope, b"access-control-request-headers")).decode("latin-1")
    if _HEADER_NAMES.fullmatch(asked):
        headers["access-control-allow-headers"] = asked
    if header_values(scope, b"access-control-request-private-network") == [b"true"]:
        headers["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=headers)


class BodyLimit(Guard):
    """Counts the body as it arrives and stops reading at the limit."""

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 for a declared length, or make `receive` raise BodyTooLarge."""
        limit = CHUNK_BYTES if is_chunk(scope) else self._settings.max_body
        error = BodyTooLarge(f"The request body is larger than {format_bytes(limit)}.")
        declared = header_values(scope, b"content-length")
        if any(value.isdigit() and int(value[:20]) > limit for value in declared):
            await self.refusal(error, headers=CLOSE)(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise error
            return message

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and received > limit:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, counted_receive, send_closing)


class ContentTypeGuard(Guard):
    """Accepts JSON bodies only: a web page can send other types without a CORS preflight.

    Chunks of uploads are bytes.
    """

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 415 or pass on."""
        if scope["method"] in _BODY_METHODS and not self._is_plain(scope):
            error = RequestError(
                "The body must be the bytes of a chunk: send `Content-Type: "
                "application/octet-stream` and no Content-Encoding."
                if is_chunk(scope)
                else "The body must be JSON: send `Content-Type: application/json` and no "
                "Content-Encoding."
            )
            await self.refusal(error, status=415, headers=CLOSE)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_plain(self, scope: Scope) -> bool:
        types = header_values(scope, b"content-type")
        encodings = header_values(scope, b"content-encoding")
        if len(types) != 1 or any(value.strip().lower() != b"identity" for value in encodings):
            return False
        expected = CHUNK_TYPE if is_chunk(scope) else b"application/json"
        return types[0].partition(b";")[0].strip().lower() == expected


class DrainGuard(Guard):
    """Counts running requests, and refuses new ones while the server is stopping."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, drain: Drain) -> None:
        super().__init__(app, settings, metrics)
        self._drain = drain

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 503 and close the connection, so that the next request goes elsewhere."""
        if scope["path"] in _DRAIN_PATHS:
            await self._app(scope, receive, send)
            return
        if self._drain.is_on:
            await self.refusal(self._drain.refusal(), headers=CLOSE)(scope, receive, send)
            return
        if scope["path"] == _EVENTS_PATH:
            await self._app(scope, receive, send)
            return
        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.in_flight -= 1
