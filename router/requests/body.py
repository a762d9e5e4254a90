"""Parses and validates JSON request bodies into request models."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jiter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from core.errors import RequestError
from router.requests.fields import RequestBody

Body = TypeVar("Body", bound=RequestBody)

_VALUE_LIMIT = 2_000_000


async def read_request(request: Request, model: type[Body]) -> Body:
    """Read and validate the body.  Raises RequestError, UnsupportedParameter, BodyTooLarge."""
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise RequestError("The client disconnected before its request was complete.") from error
    return parse_request(body, model)


def parse_request(body: bytes, model: type[Body]) -> Body:
    """Validate `body`.

    Strict JSON: no duplicate keys, lone surrogates, NaN, byte order mark, or nesting over 200.
    Raises RequestError naming the field, UnsupportedParameter, UnsupportedCapability.
    """
    try:
        # Otherwise a small body of empty lists could become gigabytes of objects.
        if sum(map(body.count, (b",", b"[", b"{"))) > _VALUE_LIMIT:
            raise ValueError(f"more than {_VALUE_LIMIT:,} values")
        data = jiter.from_json(
            body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys"
        )
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {str(error)[:200]}.") from error
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    return validate_request(data, model)


def validate_request(data: dict[str, Any], model: type[Body]) -> Body:
    """Validate parsed JSON.  Raises as `parse_request` does."""
    try:
        parsed = model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # Of a union's members, report the one that validated furthest.
        nearest = max(errors, key=lambda one: len(one["loc"]))
        param = _param(nearest["loc"])
        message = nearest["msg"].removeprefix("Value error, ")
        raise RequestError(f"{param}: {message}" if param else message, param=param) from error
    parsed.refuse_unsupported()
    return parsed


def _param(location: Iterable[int | str]) -> str | None:
    """Return `messages[0].content` for pydantic's location, without the union members' names."""
    param = ""
    for part in location:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in ("str", "int") and "[" not in part:
            param += f".{part[:64]}" if param else part[:64]
    return param or None
