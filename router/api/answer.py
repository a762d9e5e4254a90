"""Sends pydantic models as the answers of the management API."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


def answer(content: BaseModel, status: int = 200, *, is_private: bool = False) -> Response:
    """Return `content` as JSON, for no browser a page; what is private is kept in no cache."""
    headers = {"x-content-type-options": "nosniff"}
    if is_private:
        headers["cache-control"] = "no-store"
    return Response(content.model_dump_json(), status, headers, media_type="application/json")
