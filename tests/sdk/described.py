"""Compares answers of an application with its own OpenAPI description.

`client_of` in tests/live_server.py does so with every answer that a test gets.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import httpx
from fastapi import FastAPI
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from starlette.routing import Match

from tests.sdk.deviations import decisive, told

Json: TypeAlias = Mapping[str, Any]

# Not described: what a client gets that has closed its connection.
_CLIENT_CLOSED = 499
# Validating a longer body, such as thousands of vectors, takes seconds.
_MAX_BYTES = 200_000
_MAX_EVENTS = 200
_ENVELOPES = ("Error", "AnthropicError")
_ERRORS = {"anyOf": [{"$ref": f"#/components/schemas/{one}"} for one in _ENVELOPES]}


@dataclass
class Description:
    """The description of the routes of an application; `seen` has operations with statuses."""

    document: Json
    seen: set[tuple[str, int]] = field(default_factory=set)
    _validators: dict[str, Any] = field(default_factory=dict)

    def deviations(self, path: str | None, method: str, response: httpx.Response) -> list[str]:
        """Return what of a response, which has been read, is not described; empty if all is.

        `path` is that of the route as the description names it, None for no route.
        """
        status = response.status_code
        if status == _CLIENT_CLOSED or method == "HEAD":
            return []
        operation = self.document["paths"].get(path, {}).get(method.lower())
        if operation is None:
            is_refused = status >= 400
            return list(self._faults(_ERRORS, response.content)) if is_refused else []
        self.seen.add((operation["operationId"], status))
        described = operation["responses"].get(str(status))
        if described is None:
            if status < 400:
                return [f"the status {status} is not described"]
            described = operation["responses"]["default"]
        content = described.get("content", {})
        if not content:
            return ["there is a body, but none is described"] if response.content else []
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if media_type not in content:
            return [f"the type {media_type!r} is not described"]
        return list(self._content_faults(media_type, content[media_type], response.content))

    def _content_faults(self, media_type: str, content: Json, body: bytes) -> Iterator[str]:
        if media_type == "text/event-stream":
            for data in _event_data(body):
                yield from self._faults(content["x-event-data"], data)
        elif media_type == "application/json":
            yield from self._faults(content["schema"], body)

    def _faults(self, schema: Json, body: bytes) -> Iterator[str]:
        if len(body) > _MAX_BYTES:
            return
        value = json.loads(body)
        for error in decisive(self._validator(schema).iter_errors(value)):
            yield told(error)

    def _validator(self, schema: Json) -> Any:
        key = json.dumps(schema, sort_keys=True)
        if key not in self._validators:
            components = {"components": self.document["components"]}
            self._validators[key] = Draft202012Validator({**components, **schema})
        return self._validators[key]


def description_of(app: FastAPI) -> Description:
    """Return the description of an application's routes, which is made once for the same ones."""
    routes = tuple(
        (route.path, *sorted(route.methods or ()))
        for route in app.routes
        if isinstance(route, APIRoute)
    )
    return _described(_Hidden(app), routes)


class CheckedTransport(httpx.ASGITransport):
    """Calls an application in process; an answer that is not described fails the test."""

    def __init__(self, app: FastAPI, description: Description | None = None) -> None:
        """`description` notes what was seen; by default it is the one of all such applications."""
        super().__init__(app, raise_app_exceptions=False)
        self._application = app
        self._description = description

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the answer.  Raises AssertionError with all that is not described."""
        answer = await super().handle_async_request(request)
        assert isinstance(answer.stream, httpx.AsyncByteStream)
        body = b"".join([part async for part in answer.stream])
        response = httpx.Response(answer.status_code, headers=answer.headers, content=body)
        path = _route_path(self._application, request)
        described = self._description or description_of(self._application)
        found = described.deviations(path, request.method, response)
        assert not found, f"{request.method} {request.url.path}: {response.status_code}: {found}"
        return httpx.Response(
            answer.status_code, headers=answer.headers, stream=httpx.ByteStream(body)
        )


class _Hidden:
    """An application as an argument of a cached function that does not depend on which one."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


@cache
def _described(hidden: _Hidden, routes: object) -> Description:
    del routes
    return Description(hidden.app.openapi())


def _route_path(app: FastAPI, request: httpx.Request) -> str | None:
    """Return the path of the first route that answers a request, as the description has it."""
    scope = {
        "type": "http",
        "method": request.method,
        "path": request.url.path,
        "root_path": "",
        "headers": [],
    }
    for route in app.routes:
        if isinstance(route, APIRoute) and route.matches(scope)[0] is Match.FULL:
            return route.path_format
    return None


def _event_data(body: bytes) -> Iterator[bytes]:
    """Yield the data of the first events of a stream."""
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: ")]
    for line in lines[:_MAX_EVENTS]:
        data = line.removeprefix(b"data: ")
        if data != b"[DONE]":
            yield data
