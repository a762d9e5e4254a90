"""`POST /api/drain`: stops accepting requests and reports how many still run."""

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.http.drain import Drain
from router.job_service import Answer
from router.requests.strict_body import EmptyBody, read_strict


class DrainState(Answer):
    """That no more requests are accepted, and how many still run."""

    draining: Literal[True] = True
    in_flight: int


def drain_endpoint(drain: Drain) -> Endpoint:
    """Return the handler that starts draining and reports the running requests."""

    async def begin_drain(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        drain.is_on = True
        return answer(DrainState(in_flight=drain.in_flight))

    return begin_drain
