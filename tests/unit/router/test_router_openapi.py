"""The OpenAPI description: complete, valid references, and true to what the routes do."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from starlette.responses import Response

from deployments.router.credentials import StoredCredentials
from router.http.access import Access
from router.openapi import description
from router.route import Route
from tests.live_server import client_of
from tests.unit.router.every_service import make_whole_app


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return make_whole_app(StoredCredentials(tmp_path_factory.mktemp("keys") / "keys.sqlite"))


@pytest.fixture(scope="module")
def described(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_route_that_reads_a_body_describes_it(
    app: FastAPI, described: dict[str, Any]
) -> None:
    operations = [
        (method, route.path_format, described["paths"][route.path_format][method.lower()])
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    ]
    assert len(operations) > 15
    for method, path, operation in operations:
        assert ("requestBody" in operation) == (method in ("POST", "PATCH", "PUT")), path
        assert operation["tags"], path
        assert "default" in operation["responses"], path
        names = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
        assert names == {part[1:-1] for part in path.split("/") if part.startswith("{")}, path


def test_references_lead_somewhere(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    found = set(references(described))
    assert len(found) > 20
    assert {name.rpartition("/")[2] for name in found} <= set(schemas)
    chat = described["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    fields = schemas[body["$ref"].rpartition("/")[2]]["properties"]
    assert {"messages", "model", "tools", "temperature", "stop"} <= set(fields)
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    messages = described["paths"]["/v1/messages"]["post"]["responses"]["default"]
    assert "AnthropicError" in json.dumps(messages)


def test_answers_of_long_jobs_are_described(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    paths = {path: item for path, item in described["paths"].items() if "/jobs" in path}
    paths["/api/downloads"] = described["paths"]["/api/downloads"]
    assert len(paths) == 7
    for path, item in paths.items():
        for method, operation in item.items():
            status = "202" if (method, path) == ("post", "/api/downloads") else "200"
            schema = operation["responses"][status]["content"]["application/json"]["schema"]
            fields = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
            assert "jobs" in fields or {"state", "files", "bytes_per_s"} <= set(fields), path


def test_queries_of_the_hub_are_described(described: dict[str, Any]) -> None:
    search = described["paths"]["/api/hub/search"]["get"]
    found = {one["name"]: one["schema"] for one in search["parameters"]}
    assert found["limit"]["maximum"] == 100
    assert "trending" in found["sort"]["enum"]
    schema = search["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("HubResults")


def test_every_answer_of_the_api_has_a_type(described: dict[str, Any]) -> None:
    operations = [
        (path, operation)
        for path, item in described["paths"].items()
        if path.startswith("/api/")
        for operation in item.values()
    ]
    assert len(operations) > 30
    for path, operation in operations:
        (status,) = operation["responses"].keys() - {"default"}
        assert ("content" in operation["responses"][status]) is (status != "204"), path


def test_operations_have_names_and_areas(described: dict[str, Any]) -> None:
    found = [one for item in described["paths"].values() for one in item.values()]
    names = {one["operationId"] for one in found}
    assert {"listModels", "loadModel", "createKey", "createChatCompletion"} <= names
    assert len(names) == len(found)
    tags = {tag for one in found for tag in one["tags"]}
    assert tags == {tag["name"] for tag in described["tags"]}
    assert {"models", "keys", "chat", "tokens", "server"} <= tags


def test_errors_have_every_code(described: dict[str, Any]) -> None:
    codes = described["components"]["schemas"]["ErrorCode"]["enum"]
    assert {"invalid_request", "model_not_found", "internal_error", "hub_offline"} <= set(codes)
    assert codes == sorted(codes)


def test_two_operations_of_one_name_are_refused() -> None:
    async def show_it() -> Response:
        raise AssertionError

    routes = [Route(Access.READ, "GET", path, show_it) for path in ("/api/a", "/api/b")]
    with pytest.raises(ValueError, match=r"showIt is the id of /api/a and of /api/b"):
        description(routes, title="t", version="1")


def test_schemas_are_valid(described: dict[str, Any]) -> None:
    for name, schema in described["components"]["schemas"].items():
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            pytest.fail(f"{name}: {error.message}")


def open_objects(schema: Any, schemas: dict[str, Any], seen: set[str]) -> Iterator[str]:
    """Yield the objects in a schema that allow fields they do not name, other than mappings."""
    if isinstance(schema, list):
        for inner in schema:
            yield from open_objects(inner, schemas, seen)
    if not isinstance(schema, dict):
        return
    if "properties" in schema and schema.get("additionalProperties") is not False:
        yield json.dumps(sorted(schema["properties"]))
    for key, inner in schema.items():
        if key == "$ref" and inner not in seen:
            seen.add(inner)
            yield from open_objects(schemas[inner.rpartition("/")[2]], schemas, seen)
        elif key != "$ref":
            yield from open_objects(inner, schemas, seen)


def test_no_answer_may_have_fields_that_are_not_described(described: dict[str, Any]) -> None:
    schemas, seen = described["components"]["schemas"], set[str]()
    for path, item in described["paths"].items():
        for operation in item.values():
            assert list(open_objects(operation["responses"], schemas, seen)) == [], path
    assert len(seen) > 100
    given: dict[str, Any] = {"a": {"properties": {"b": {}}}}
    assert list(open_objects({"$ref": "#/a"}, given, set())) == ['["b"]']


async def test_it_is_served(app: FastAPI, described: dict[str, Any]) -> None:
    async with client_of(app) as http:
        response = await http.get("/openapi.json")
    assert response.json() == json.loads(json.dumps(described))
