"""`GET /api/decisions`: what the scheduler decided, and why."""

from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.job_service import Answer
from router.services import Management

MAX_DECISIONS = 1000


class Decision(Answer):
    """What the scheduler did about an event, and why; `at` is in Unix seconds."""

    at: float
    event: str
    action: str
    reason: str


class DecisionList(Answer):
    """Decisions, newest first."""

    decisions: list[Decision]


def decisions_endpoint(management: Management) -> Endpoint:
    """Return the handler that lists the last 1,000 decisions, newest first."""

    async def list_decisions(request: Request) -> Response:
        del request
        found = sorted(await management.decisions(), key=lambda one: one.at, reverse=True)
        shown = [
            Decision(at=one.at, event=one.event, action=one.action, reason=one.reason)
            for one in found[:MAX_DECISIONS]
        ]
        return answer(DecisionList(decisions=shown))

    return list_decisions
