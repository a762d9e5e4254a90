"""`/api/aliases`: names that users give to models, and can point to other models at any time."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.context import NAME_LIMIT, RouteContext
from router.job_service import Answer
from router.requests.strict_body import StrictBody, read_strict
from router.services import Management
from router.v1.models import find_model


class AliasTarget(StrictBody):
    """The model that an alias shall name: an id, a bare name or another alias."""

    model: Annotated[str, Field(min_length=1, max_length=NAME_LIMIT)]


class Alias(Answer):
    """An alias and the id of its model."""

    alias: str
    model: str


class AliasList(Answer):
    """All aliases, by name."""

    aliases: list[Alias]


def aliases_endpoint(management: Management) -> Endpoint:
    """Return the handler of the list."""

    async def list_aliases(request: Request) -> Response:
        del request
        known = await management.aliases()
        found = [Alias(alias=alias, model=known[alias]) for alias in sorted(known)]
        return answer(AliasList(aliases=found))

    return list_aliases


def set_alias_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that makes an alias, or points it to another model."""

    async def set_alias(request: Request) -> Response:
        target = await read_strict(request, AliasTarget)
        view = await find_model(context, target.model)
        alias = str(request.path_params["alias"])
        await management.set_alias(alias, view.id)
        return answer(Alias(alias=alias, model=view.id))

    return set_alias


def remove_alias_endpoint(management: Management) -> Endpoint:
    """Return the handler that deletes an alias; its model stays."""

    async def remove_alias(request: Request) -> Response:
        await management.remove_alias(str(request.path_params["alias"]))
        return Response(status_code=204)

    return remove_alias
