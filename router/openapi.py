"""The OpenAPI description: parameters, bodies, answers, errors and access of all routes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from core import errors
from core.errors import ImpetusError
from core.supervision import call_in_thread
from router.http.access import Access
from router.route import Described, Route

Schema: TypeAlias = dict[str, Any]
Mode: TypeAlias = Literal["validation", "serialization"]

_VERSION = "3.1.0"
_SCHEMAS = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
# Names of areas where the path does not tell them.
_AREAS = {"tokenize": "tokens", "detokenize": "tokens", "apply-template": "tokens"}
_OF_THE_SERVER = frozenset({"", "openapi.json", "metrics", "healthz", "readyz", "health", "drain"})
_IDEMPOTENCY_KEY: Mapping[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key and body get the same answer for 24 hours, and run once",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
_SESSION_COOKIE = "impetus_session_8000"
_SECURITY: Mapping[str, Any] = {
    "apiKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, if there is one, or the management token",
    },
    "apiKeyHeader": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "An API key, as Anthropic's clients send it",
    },
    "managementToken": {
        "type": "apiKey",
        "in": "header",
        "name": "X-Impetus-Token",
        "description": "The management token, which scripts/serve prints",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": _SESSION_COOKIE,
        "description": "A browser's session; the name ends with the port of the server",
    },
}


def describe_routes(app: FastAPI, routes: Sequence[Route]) -> None:
    """Make `app.openapi` describe `routes`, which `app` has, and their errors.

    The description is built when it is first asked for.
    """

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = description(routes, title=app.title, version=app.version)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def description_route(app: FastAPI) -> Route:
    """Return the route that shows the description of `app`, with itself.

    It is built on a thread: that takes more than 100 ms, for which no stream may stand still.
    """

    async def show_openapi() -> Response:
        built = await call_in_thread("impetus-openapi", app.openapi)
        return JSONResponse(built)

    return Route(Access.INFERENCE, "GET", "/openapi.json", show_openapi, answer=dict[str, Any])


def description(routes: Sequence[Route], *, title: str, version: str) -> dict[str, Any]:
    """Return the description of `routes`; the same routes always give the same.

    Raises ValueError if two operations have the same id.
    """
    schemas = _Schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    used: dict[str, Route] = {}
    for route in routes:
        earlier = used.setdefault(route.operation_id, route)
        if earlier is not route:
            raise ValueError(
                f"{route.operation_id} is the id of {earlier.path} and of {route.path}; give one a "
                "name"
            )
        _, path, convertors = compile_path(route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, convertors, schemas)
    tags = sorted({area_of(route.path) for route in routes})
    return {
        "openapi": _VERSION,
        "info": {"title": title, "version": version},
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {
            "schemas": {**schemas.definitions, **_error_schemas()},
            "securitySchemes": dict(_SECURITY),
        },
    }


def area_of(path: str) -> str:
    """Return what a path is about: its first part that names something."""
    parts = [part for part in path.split("/") if part not in ("", "api", "v1", "v2")]
    area = parts[0] if parts else ""
    return "server" if area in _OF_THE_SERVER else _AREAS.get(area, area)


class _Untitled(GenerateJsonSchema):
    """Leaves out titles of fields, which only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return that no field has a title."""
        del schema
        return False


class _Schemas:
    """The schemas of what routes take and send; those with the same name get longer ones."""

    def __init__(self, routes: Iterable[Route]) -> None:
        wanted = dict.fromkeys(key for route in routes for key in _types(route))
        inputs = [(key, key[1], TypeAdapter(key[0])) for key in wanted]
        self._places, found = TypeAdapter.json_schemas(
            inputs, ref_template=_SCHEMAS, schema_generator=_Untitled
        )
        self.definitions: Schema = dict(found.get("$defs", {}))
        self._queries: dict[Any, tuple[Schema, list[str]]] = {}

    def of(self, kind: Described, mode: Mode) -> Any:
        """Return the schema of a type, mostly a reference."""
        return self._places[(kind, mode), mode]

    def query(self, route: Route) -> Iterator[tuple[str, Schema, bool]]:
        """Yield each parameter of a query with its schema, and whether it is required."""
        if route.query is None:
            return
        schema = route.query.model_json_schema(ref_template=_SCHEMAS, schema_generator=_Untitled)
        self.definitions |= schema.get("$defs", {})
        for name, one in schema.get("properties", {}).items():
            yield name, one, name in schema.get("required", ())


def _types(route: Route) -> Iterator[tuple[Any, Mode]]:
    if route.body is not None:
        yield route.body, "validation"
    for sent in (route.answer, route.event):
        if sent is not None:
            yield sent, "serialization"


def _operation(route: Route, path_names: Iterable[str], schemas: _Schemas) -> Schema:
    operation: Schema = {
        "operationId": route.operation_id,
        "tags": [area_of(route.path)],
        "x-access": route.access.value,
        "parameters": [
            *({"name": one, "in": "path", "required": True, "schema": _TEXT} for one in path_names),
            *(
                {"name": name, "in": "query", "required": is_required, "schema": schema}
                for name, schema, is_required in schemas.query(route)
            ),
            *([_IDEMPOTENCY_KEY] if route.is_idempotent else []),
        ],
        "responses": {
            str(route.status): _success(route, schemas) if route.status < 400 else _failure(route),
            "default": _failure(route),
        },
    }
    if route.body is not None:
        fields = route.body.model_fields.values()
        operation["requestBody"] = {
            "required": any(field.is_required() for field in fields),
            "content": {"application/json": {"schema": schemas.of(route.body, "validation")}},
        }
    if route.is_binary:
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.access in (Access.READ, Access.MANAGE):
        operation["security"] = [{}, *({name: []} for name in _SECURITY)]
        if route.access is Access.MANAGE:
            del operation["security"][0]
    elif route.access is Access.INFERENCE:
        operation["security"] = [{}, {"apiKey": []}, {"apiKeyHeader": []}, {"session": []}]
    else:
        operation["security"] = []
    return operation


def _success(route: Route, schemas: _Schemas) -> Schema:
    response: Schema = {"description": HTTPStatus(route.status).phrase}
    content: Schema = {}
    if route.answer is not None:
        content[route.media_type] = {"schema": schemas.of(route.answer, "serialization")}
    if route.event is not None:
        # OpenAPI has `itemSchema` for this from 3.2 on, which generators of clients do not read.
        data = [schemas.of(route.event, "serialization"), {"$ref": _error_of(route.path)}]
        content["text/event-stream"] = {"schema": _TEXT, "x-event-data": {"anyOf": data}}
    return {**response, "content": content} if content else response


def _failure(route: Route) -> Schema:
    schema: Schema = {"$ref": _error_of(route.path)}
    if route.path.startswith("/v1/models"):
        # The header `anthropic-version` decides.
        schema = {"anyOf": [schema, {"$ref": _SCHEMAS.format(model="AnthropicError")}]}
    return {
        "description": "An error",
        "content": {"application/json": {"schema": schema}},
    }


def _error_of(path: str) -> str:
    is_of_anthropic = path.startswith("/v1/messages")
    return _SCHEMAS.format(model="AnthropicError" if is_of_anthropic else "Error")


def _error_schemas() -> Schema:
    """Return both APIs' envelopes; the codes and types are those of `core.errors`."""
    kinds = [*_kinds(ImpetusError)]
    codes = sorted({kind.code for kind in kinds})
    types = sorted({kind.type for kind in kinds})
    return {
        "Error": _object(
            error=_object(
                message=_TEXT,
                type={"enum": types},
                param={"type": ["string", "null"]},
                code={"$ref": _SCHEMAS.format(model="ErrorCode")},
            )
        ),
        "ErrorCode": {"type": "string", "enum": codes},
        "AnthropicError": _object(
            type={"const": "error"},
            error={
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "message"],
                "properties": {
                    "type": _TEXT,
                    "message": _TEXT,
                    "details": _object(error_code={"$ref": _SCHEMAS.format(model="ErrorCode")}),
                },
            },
            request_id=_TEXT,
        ),
    }


def _kinds(kind: type[ImpetusError]) -> Iterator[type[ImpetusError]]:
    if kind.__module__ == errors.__name__:
        yield kind
    for inner in kind.__subclasses__():
        yield from _kinds(inner)


def _object(**fields: Any) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(fields),
        "properties": fields,
    }
