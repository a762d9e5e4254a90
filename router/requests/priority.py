"""Chooses a request's priority class: by header, else service tier, else the model's setting."""

from starlette.requests import Request

from core.errors import RequestError
from core.types import Priority
from router.requests.fields import KNOWN_TIERS
from router.services import ModelView

HEADER = "x-impetus-priority"


def request_priority(request: Request, tier: str | None, view: ModelView) -> Priority:
    """Return the priority class in which the request is queued.

    OpenAI's `flex` is its cheaper and slower tier (Source: OpenAI API reference, `service_tier`).
    Raises RequestError for a header with another value, or for several that differ.
    """
    values = set(request.headers.getlist(HEADER))
    if not values:
        if tier not in KNOWN_TIERS:
            return view.priority
        return "batch" if tier == "flex" else "interactive"
    if values == {"batch"}:
        return "batch"
    if values == {"interactive"}:
        return "interactive"
    raise RequestError(f"{HEADER}: must be interactive or batch", param=HEADER)
