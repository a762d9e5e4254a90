"""`GET /api/decisions`: what the scheduler decided, and why."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict

from pydantic_core import to_json
from starlette.responses import Response

from router.services import Management

MAX_DECISIONS = 1000


def decisions_endpoint(management: Management) -> Callable[[], Awaitable[Response]]:
    """Return the handler that lists the last 1,000 decisions, newest first."""

    async def list_decisions() -> Response:
        decisions = sorted(await management.decisions(), key=lambda one: one.at, reverse=True)
        shown = [asdict(decision) for decision in decisions[:MAX_DECISIONS]]
        return Response(to_json({"decisions": shown}), media_type="application/json")

    return list_decisions
