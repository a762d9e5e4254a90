"""`GET /api/models`: the library with filters, search, order, pages and counts of facets."""

import asyncio
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core.errors import RequestError
from router.api.answer import Endpoint, answer
from router.api.models import ModelDetail, Tag, describe
from router.context import RouteContext
from router.job_service import Answer
from router.library import FACETS, Library, LibraryQuery, Position, SortKey
from router.services import ModelState

_Word = Annotated[str, Field(min_length=1, max_length=100)]
_Bytes = Annotated[int, Field(ge=0, le=2**53)]
_Sort = Literal[
    "id", "name", "format", "size", "parameters", "context", "added",
    "-id", "-name", "-format", "-size", "-parameters", "-context", "-added",
]  # fmt: skip
_CapabilityName = Literal[
    "chat", "completion", "embedding", "rerank", "tools", "reasoning", "infill"
]
_LONGEST_CURSOR = 2048


class ListFilter(BaseModel):
    """Which models the list has, in which order.

    Of `format`, `state` and `source` a model has one of those that are named, of `capability` and
    `tag` all.  Each word of `text` is in its id, names, tags or notes.  `sort` with a hyphen is
    descending.  Without a `limit` all models are listed; `cursor` is the `next_cursor` of the page
    before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    format: Annotated[list[_Word], Field(max_length=16)] = []
    capability: Annotated[list[_CapabilityName], Field(max_length=16)] = []
    state: Annotated[list[ModelState], Field(max_length=16)] = []
    source: Annotated[list[_Word], Field(max_length=16)] = []
    tag: Annotated[list[Tag], Field(max_length=32)] = []
    favourite: bool | None = None
    text: Annotated[str, Field(max_length=200)] = ""
    min_bytes: _Bytes | None = None
    max_bytes: _Bytes | None = None
    sort: _Sort = "id"
    limit: Annotated[int, Field(ge=1, le=1000)] | None = None
    cursor: Annotated[str, Field(max_length=_LONGEST_CURSOR)] = ""


class Facets(Answer):
    """How many models each value would give, the other filters as they are."""

    format: dict[str, int]
    capability: dict[str, int]
    state: dict[str, int]
    source: dict[str, int]
    tag: dict[str, int]
    favourite: dict[str, int]


class ModelList(Answer):
    """A page of models; `total` counts those of all pages.

    `next_cursor` is null on the last page.  `smallest_bytes` and `largest_bytes` are the sizes of
    the models that the other filters leave.
    """

    models: list[ModelDetail]
    total: int
    next_cursor: str | None
    facets: Facets
    smallest_bytes: int
    largest_bytes: int


def list_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler of the list."""
    library = Library()

    async def list_models(request: Request) -> Response:
        asked = _list_filter(request)
        query = _query(asked)
        view = await context.services.catalog.library()
        # After a change of a large library an index is made.
        page = await asyncio.to_thread(library.query, view, query)
        low, high = page.sizes
        return answer(
            ModelList(
                models=[describe(view, entry.settings) for view, entry in page.entries],
                total=page.total,
                next_cursor=None if page.next is None else _cursor(asked.sort, page.next),
                facets=Facets(**{name: dict(page.facets[name]) for name in FACETS}),
                smallest_bytes=low,
                largest_bytes=high,
            )
        )

    return list_models


def _list_filter(request: Request) -> ListFilter:
    """Return what the query asks for.  Raises RequestError for an unknown or malformed part."""
    query = request.query_params
    given: dict[str, Any] = {name: query[name] for name in query}
    for name in ("format", "capability", "state", "source", "tag"):
        if name in given:
            given[name] = query.getlist(name)
    try:
        return ListFilter.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = str(first["loc"][0])[:64]
        raise RequestError(f"{param}: {first['msg']}", param=param) from error


def _query(asked: ListFilter) -> LibraryQuery:
    favourite = () if asked.favourite is None else ("true" if asked.favourite else "false",)
    key = asked.sort.removeprefix("-")
    return LibraryQuery(
        wanted={
            "format": asked.format,
            "capability": asked.capability,
            "state": asked.state,
            "source": asked.source,
            "tag": asked.tag,
            "favourite": favourite,
        },
        words=asked.text.split(),
        min_bytes=asked.min_bytes,
        max_bytes=asked.max_bytes,
        sort=next(name for name in get_args(SortKey) if name == key),
        is_descending=asked.sort.startswith("-"),
        limit=asked.limit,
        after=_position(asked) if asked.cursor else None,
    )


def _cursor(sort: str, position: Position) -> str:
    return urlsafe_b64encode(json.dumps([sort, *position]).encode()).decode()


def _position(asked: ListFilter) -> Position:
    """Return what a cursor says.  Raises RequestError if it is none of this order."""
    try:
        sort, value, name = json.loads(urlsafe_b64decode(asked.cursor.encode()))
    except (ValueError, TypeError, RecursionError):
        sort, value, name = None, None, None
    kinds = int if asked.sort.strip("-") in ("size", "parameters", "context", "added") else str
    if sort != asked.sort or type(value) is not kinds or not isinstance(name, str):
        raise RequestError(
            "cursor: it is not that of a page in this order; send the next_cursor of the page "
            "before with the same sort.",
            param="cursor",
        )
    return value, name
