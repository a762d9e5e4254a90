"""Stopping without losing an answer: what runs may end, nothing new begins."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import Draining
from core.metrics import Metrics
from router.http.errors import error_response

# These answer to the end: who stops the server asks them.
_ALWAYS = ("/healthz", "/readyz", "/metrics", "/api/drain")
_RETRY_AFTER_S = 10


class Drain:
    """Whether the server is stopping, and how many requests still run."""

    def __init__(self) -> None:
        self.is_on = False
        self.in_flight = 0

    @staticmethod
    def refusal() -> Draining:
        """Return what a request is told that comes too late."""
        return Draining(
            "The server is stopping and takes no new requests.", retry_after_s=_RETRY_AFTER_S
        )


class DrainGuard:
    """Counts requests, and refuses new ones while the server is stopping."""

    def __init__(self, app: ASGIApp, drain: Drain, metrics: Metrics) -> None:
        self._app = app
        self._drain = drain
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or refuse."""
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self._app(scope, receive, send)
            return
        if self._drain.is_on:
            refusal = self._drain.refusal()
            self._metrics.errors.labels(refusal.code).inc()
            await error_response(refusal)(scope, receive, _closing(send))
            return
        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.in_flight -= 1


def _closing(send: Send) -> Send:
    """Return a `send` that also ends the connection: the next request goes elsewhere."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return send_and_close
