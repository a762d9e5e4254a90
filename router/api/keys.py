"""`/api/keys`: lists, creates and revokes API keys; a key's text is shown once."""

import time
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from core.keys import ApiKey, Scope
from router.api.answer import Endpoint, answer
from router.job_service import Answer
from router.requests.strict_body import StrictBody, read_strict
from router.services import Credentials

_MOST_DAYS = 36_500


class NewKey(StrictBody):
    """The key to create; without `expires_in_days` it never expires."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[list[str], Field(min_length=1, max_length=10)]
    expires_in_days: Annotated[float, Field(gt=0, le=_MOST_DAYS)] | None = None


class KeyView(Answer):
    """An API key without its text; times are in Unix seconds, null for never."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    is_expired: bool


class CreatedKey(KeyView):
    """A new API key with its text, which is shown this once."""

    key: str


class KeyList(Answer):
    """All API keys, oldest first."""

    keys: list[KeyView]


def list_keys_endpoint(credentials: Credentials) -> Endpoint:
    """Return the handler that lists all keys without their texts."""

    async def list_keys(request: Request) -> Response:
        del request
        found = [KeyView(**_described(key)) for key in await credentials.keys()]
        return answer(KeyList(keys=found), is_private=True)

    return list_keys


def create_key_endpoint(credentials: Credentials) -> Endpoint:
    """Return the handler that creates a key, and shows its text in the field `key`."""

    async def create_key(request: Request) -> Response:
        body = await read_strict(request, NewKey)
        days = body.expires_in_days
        expires_at = None if days is None else time.time() + days * 24 * 3600
        key, text = await credentials.create_key(body.name, body.scopes, expires_at)
        return answer(CreatedKey(**_described(key), key=text), 201, is_private=True)

    return create_key


def revoke_key_endpoint(credentials: Credentials) -> Endpoint:
    """Return the handler that deletes a key."""

    async def revoke_key(request: Request) -> Response:
        await credentials.revoke_key(str(request.path_params["key_id"]))
        return Response(status_code=204)

    return revoke_key


def _described(key: ApiKey) -> dict[str, Any]:
    return {**key.described(), "is_expired": not key.is_valid_at(time.time())}
