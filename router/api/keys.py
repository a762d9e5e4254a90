"""`/api/keys`: lists, creates and revokes API keys; a key's text is shown once."""

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeAlias

from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.keys import ApiKey
from router.requests.strict_body import StrictBody, read_strict
from router.services import Credentials

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

_MOST_DAYS = 36_500


class NewKey(StrictBody):
    """The key to create; without `expires_in_days` it never expires."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[list[str], Field(min_length=1, max_length=10)]
    expires_in_days: Annotated[float, Field(gt=0, le=_MOST_DAYS)] | None = None


def list_keys_endpoint(credentials: Credentials) -> Endpoint:
    """Return the handler that lists all keys without their texts."""

    async def list_keys(request: Request) -> Response:
        del request
        return _answer({"keys": [_described(key) for key in await credentials.keys()]})

    return list_keys


def create_key_endpoint(credentials: Credentials) -> Endpoint:
    """Return the handler that creates a key, and shows its text in the field `key`."""

    async def create_key(request: Request) -> Response:
        body = await read_strict(request, NewKey)
        days = body.expires_in_days
        expires_at = None if days is None else time.time() + days * 24 * 3600
        key, text = await credentials.create_key(body.name, body.scopes, expires_at)
        return _answer({**_described(key), "key": text}, status=201)

    return create_key


def revoke_key_endpoint(credentials: Credentials) -> Endpoint:
    """Return the handler that deletes a key."""

    async def revoke_key(request: Request) -> Response:
        await credentials.revoke_key(str(request.path_params["key_id"]))
        return Response(status_code=204)

    return revoke_key


def _described(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
        "is_expired": not key.is_valid_at(time.time()),
    }


def _answer(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(to_json(content), status, headers, media_type="application/json")
