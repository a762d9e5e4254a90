"""`POST /api/drain`: stops accepting requests and reports how many still run."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from router.http.drain import Drain
from router.requests.strict_body import EmptyBody, read_strict


def drain_endpoint(drain: Drain) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that starts draining and reports the running requests."""

    async def begin_drain(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        drain.is_on = True
        return JSONResponse({"draining": True, "in_flight": drain.in_flight})

    return begin_drain
