"""`/api/hub`: searching a model hub, and what of a repository fits this machine."""

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.hub_service import Hub, HubSearch, HubSort
from router.requests.limits import MAX_INT32
from router.requests.query import Query, read_query
from router.requests.strict_body import StrictBody, read_strict

# As words, so that the OpenAPI description of the query needs no definition elsewhere.
CapabilityName: TypeAlias = Literal[
    "chat", "completion", "embedding", "rerank", "tools", "reasoning", "infill"
]
DEFAULT_CONTEXT = 8192
_MOST = 2**53
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Name = Annotated[str, Field(max_length=100)]


class SearchQuery(Query):
    """The filters and the order of a search; parameters are counted in units."""

    query: Annotated[str, Field(max_length=200)] = ""
    author: _Name = ""
    format: Annotated[str, Field(max_length=40)] = ""
    capability: CapabilityName | None = None
    licence: _Name = ""
    gated: bool | None = None
    min_parameters: _Count | None = None
    max_parameters: _Count | None = None
    updated_after: datetime | None = None
    sort: HubSort = "trending"
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    cursor: Annotated[str, Field(max_length=4096)] = ""


class ReadmeQuery(Query):
    """Which revision of a repository is read: a branch, a tag or a commit."""

    revision: Annotated[str, Field(max_length=200)] = ""


class RepositoryQuery(ReadmeQuery):
    """Which revision is read, and the context in tokens that models are to fit at."""

    context: Annotated[int, Field(ge=1, le=MAX_INT32)] = DEFAULT_CONTEXT


class ReferenceQuery(Query):
    """What a user pasted: a name, an address, or a command that downloads a model."""

    text: Annotated[str, Field(min_length=1, max_length=2048)]


class TokenBody(StrictBody):
    """A token of the hub, which is stored and never shown."""

    token: Annotated[str, Field(min_length=1, max_length=1024)]


def search_endpoint(hub: Hub) -> Endpoint:
    """Return the handler of a search."""

    async def search_hub(request: Request) -> Response:
        query = read_query(request, SearchQuery)
        wanted = HubSearch(text=query.query, **query.model_dump(exclude={"query"}))
        return answer(await hub.search(wanted))

    return search_hub


def repository_endpoint(hub: Hub) -> Endpoint:
    """Return the handler of one repository."""

    async def show_repository(request: Request) -> Response:
        query = read_query(request, RepositoryQuery)
        return answer(await hub.repository(_name(request), query.revision, query.context))

    return show_repository


def readme_endpoint(hub: Hub) -> Endpoint:
    """Return the handler of a repository's README."""

    async def show_readme(request: Request) -> Response:
        query = read_query(request, ReadmeQuery)
        return answer(await hub.readme(_name(request), query.revision))

    return show_readme


def resolve_endpoint(hub: Hub) -> Endpoint:
    """Return the handler that tells what a pasted text refers to."""

    async def resolve_reference(request: Request) -> Response:
        return answer(await hub.resolve(read_query(request, ReferenceQuery).text))

    return resolve_reference


def token_endpoint(hub: Hub) -> Endpoint:
    """Return the handler that tells which token is in use."""

    async def show_token(request: Request) -> Response:
        del request
        return answer(await hub.token())

    return show_token


def store_token_endpoint(hub: Hub) -> Endpoint:
    """Return the handler that stores a token."""

    async def store_token(request: Request) -> Response:
        return answer(await hub.store_token((await read_strict(request, TokenBody)).token))

    return store_token


def remove_token_endpoint(hub: Hub) -> Endpoint:
    """Return the handler that forgets the stored token."""

    async def remove_token(request: Request) -> Response:
        del request
        return answer(await hub.remove_token())

    return remove_token


def _name(request: Request) -> str:
    return f"{request.path_params['owner']}/{request.path_params['name']}"
