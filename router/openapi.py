"""The OpenAPI description: request bodies, error envelopes and access classes of all routes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import compile_path

from router.http.access import Access
from router.route import Route

_SCHEMAS = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_ERRORS: Mapping[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": _TEXT,
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
            },
            "request_id": _TEXT,
        },
    },
}
_SECURITY: Mapping[str, Any] = {
    "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key, if there is one"},
    "managementToken": {"type": "apiKey", "in": "header", "name": "X-Impetus-Token"},
}


def describe_routes(app: FastAPI, routes: Sequence[Route]) -> None:
    """Make `app.openapi` describe `routes`, which `app` has, and their errors.

    The description is built when it is first asked for.
    """

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, routes)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _description(app: FastAPI, routes: Sequence[Route]) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=app.version, routes=app.routes)
    # Models of different APIs have the same names; pydantic then adds their modules.
    places, definitions = models_json_schema(
        [
            *((body, "validation") for body in _used(route.body for route in routes)),
            *((answer, "serialization") for answer in _used(route.answer for route in routes)),
        ],
        ref_template=_SCHEMAS,
    )
    described["components"] = {
        "schemas": {**definitions.get("$defs", {}), **_ERRORS},
        "securitySchemes": dict(_SECURITY),
    }
    for route in routes:
        _, path_format, convertors = compile_path(route.path)
        operation = described["paths"][path_format][route.method.lower()]
        _complete(operation, route, convertors)
        if route.body is not None:
            _add_body(operation, route.body, places[route.body, "validation"])
        operation["parameters"] += _parameters(route.query)
        if route.answer is not None:
            content = {"application/json": {"schema": places[route.answer, "serialization"]}}
            operation["responses"][str(route.status)]["content"] = content
    return described


def _used(models: Iterable[type[BaseModel] | None]) -> Iterable[type[BaseModel]]:
    return dict.fromkeys(model for model in models if model is not None)


def _parameters(query: type[BaseModel] | None) -> list[dict[str, Any]]:
    """Return the parameters of a query string, whose types need no definitions elsewhere."""
    properties = query.model_json_schema()["properties"] if query is not None else {}
    return [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in properties.items()
    ]


def _add_body(operation: dict[str, Any], body: type[BaseModel], schema: dict[str, Any]) -> None:
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": schema}},
    }
    if "stream" in body.model_fields:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _TEXT}


def _complete(operation: dict[str, Any], route: Route, names: Iterable[str]) -> None:
    """Add the errors, the parameters of the path, and the access to an operation."""
    model = "AnthropicError" if route.path.startswith("/v1/messages") else "Error"
    operation["responses"]["default"] = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=model)}}},
    }
    operation["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names
    ]
    if route.access in (Access.READ, Access.MANAGE):
        operation["security"] = [{}, {"apiKey": []}, {"managementToken": []}]
    elif route.access is Access.INFERENCE:
        operation["security"] = [{}, {"apiKey": []}]
