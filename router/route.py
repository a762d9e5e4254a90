"""A route: its method and path, access class, endpoint, and the types of body, query and answer."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from router.http.access import Access, access_of
from router.http.idempotency import KeptAnswers

Method: TypeAlias = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Described: TypeAlias = type[Any] | UnionType


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path; `status` is that of success.

    The types describe the route in `/openapi.json`; its endpoint reads and checks them itself.
    `event` is the data of one event of a streamed answer.  `name` is the id of the operation, by
    default that of the endpoint.  GET answers HEAD as well, unless `has_head` is false.  With
    `is_binary` the body is bytes.  With `is_idempotent` the header `Idempotency-Key` is honoured.
    """

    access: Access
    method: Method
    path: str
    endpoint: Callable[..., Awaitable[Response]]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    answer: Described | None = None
    event: Described | None = None
    status: int = 200
    name: str = ""
    media_type: str = "application/json"
    has_head: bool = True
    is_binary: bool = False
    is_idempotent: bool = False

    @property
    def operation_id(self) -> str:
        """The id of the operation, such as listModels."""
        if self.name:
            return self.name
        first, *others = self.endpoint.__name__.strip("_").split("_")
        return first + "".join(map(str.capitalize, others))


def add_routes(app: FastAPI, routes: Iterable[Route]) -> None:
    """Add routes in their order, in which they are tried; the tag of each is its access class.

    Raises ValueError if the guard of `router.http.access` would apply another class.
    """
    kept = KeptAnswers()
    for route in routes:
        applied = access_of(route.method, route.path)
        if applied is not route.access:
            raise ValueError(f"{route.path} would be guarded as {applied}, not as {route.access}")
        add = partial(
            app.add_api_route,
            route.path,
            kept.once(route.endpoint) if route.is_idempotent else route.endpoint,
            response_model=None,
            status_code=route.status,
            tags=[route.access.value],
        )
        add(methods=[route.method])
        if route.method == "GET" and route.has_head:
            add(methods=["HEAD"], include_in_schema=False)
