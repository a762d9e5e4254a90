"""Parses and validates JSON bodies of the management API; unknown fields are errors."""

from typing import Any, TypeVar

import jiter
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from core.errors import BodyTooLarge, RequestError
from core.units import KIB, format_bytes

MAX_BODY_BYTES = 64 * KIB
_LONGEST_PARAM = 64


class StrictBody(BaseModel):
    """Base of strict request bodies: no conversions, no NaN, no unknown fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class EmptyBody(StrictBody):
    """The body of a request that takes no arguments."""


Body = TypeVar("Body", bound=StrictBody)


async def read_strict(request: Request, model: type[Body], max_bytes: int = MAX_BODY_BYTES) -> Body:
    """Read and validate the body; an empty one is an empty object.

    Raises RequestError naming the field, BodyTooLarge over `max_bytes`.
    """
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise RequestError("The client disconnected before its request was complete.") from error
    if len(body) > max_bytes:
        raise BodyTooLarge(f"The body is larger than {format_bytes(max_bytes)}.")
    try:
        return model.model_validate(_parse(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"])[:_LONGEST_PARAM] or None
        message = first["msg"]
        raise RequestError(f"{param}: {message}" if param else message, param=param) from error


def _parse(body: bytes) -> dict[str, Any]:
    if not body.strip():
        return {}
    try:
        data = jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {str(error)[:200]}.") from error
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    return data
