"""The OpenAPI description: request bodies, error envelopes and access classes of all routes."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.http.access import Access

Models: TypeAlias = Mapping[tuple[str, str], type[BaseModel]]

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


def describe_routes(app: FastAPI, bodies: Models, answers: Models, queries: Models) -> None:
    """Make `app.openapi` describe bodies, answers and queries, by (method, path), and errors.

    The description is built when it is first asked for.
    """

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, bodies, answers, queries)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _description(app: FastAPI, bodies: Models, answers: Models, queries: Models) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=app.version, routes=app.routes)
    # Models of different APIs have the same names; pydantic then adds their modules.
    places, definitions = models_json_schema(
        [
            *((model, "validation") for model in dict.fromkeys(bodies.values())),
            *((model, "serialization") for model in dict.fromkeys(answers.values())),
        ],
        ref_template=_SCHEMAS,
    )
    described["components"] = {
        "schemas": {**definitions.get("$defs", {}), **_ERRORS},
        "securitySchemes": dict(_SECURITY),
    }
    for route in app.routes:
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        for method in route.methods or ():
            operation = described["paths"][route.path_format][method.lower()]
            _complete(operation, route)
            body = bodies.get((method, route.path))
            if body is not None:
                _add_body(operation, body, places[body, "validation"])
            operation["parameters"] += _parameters(queries.get((method, route.path)))
            answer = answers.get((method, route.path))
            if answer is not None:
                content = {"application/json": {"schema": places[answer, "serialization"]}}
                operation["responses"][str(route.status_code or 200)]["content"] = content
    return described


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


def _complete(operation: dict[str, Any], route: APIRoute) -> None:
    """Add the errors, the parameters of the path, and the access to an operation."""
    name = "AnthropicError" if route.path.startswith("/v1/messages") else "Error"
    operation["responses"]["default"] = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=name)}}},
    }
    operation["parameters"] = [
        {"name": one, "in": "path", "required": True, "schema": _TEXT}
        for one in route.param_convertors
    ]
    if {Access.READ.value, Access.MANAGE.value} & set(route.tags):
        operation["security"] = [{}, {"apiKey": []}, {"managementToken": []}]
    elif Access.INFERENCE.value in route.tags:
        operation["security"] = [{}, {"apiKey": []}]
