"""JSON formats: the same forms, errors and names in every API that has a format."""

import json
from typing import Any

import pytest
from openai.types.responses import Response

from core.errors import RequestError
from core.types import JsonOutput
from router.app import create_app
from router.requests.body import parse_request
from router.requests.fields import RequestBody
from router.v1.chat.request import ChatRequest
from router.v1.messages.request import MessagesRequest
from router.v1.responses.request import ResponsesRequest
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"const": 1}}}
MESSAGES = [{"role": "user", "content": "hi"}]
PLACES = ("response_format", "text.format", "output_config.format", "output_format")


def sent(place: str, form: dict[str, Any]) -> Any:
    body: dict[str, Any] = {"model": "m", "messages": MESSAGES}
    model: type[RequestBody] = ChatRequest
    match place:
        case "response_format":
            body |= {"response_format": form}
        case "text.format":
            body, model = {"model": "m", "input": "hi", "text": {"format": form}}, ResponsesRequest
        case "output_config.format":
            body |= {"max_tokens": 9, "output_config": {"format": form}}
            model = MessagesRequest
        case _:
            body |= {"max_tokens": 9, "output_format": form}
            model = MessagesRequest
    return parse_request(json.dumps(body).encode(), model)


def output(place: str, form: dict[str, Any]) -> Any:
    body = sent(place, form)
    return body.output() if isinstance(body, ChatRequest) else body.output


@pytest.mark.parametrize(
    ("form", "meant"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonOutput(None)),
        ({"type": "json_object", "schema": SCHEMA}, JsonOutput(SCHEMA)),
        ({"type": "json_object", "json_schema": {"schema": SCHEMA}}, JsonOutput(SCHEMA)),
        ({"type": "json_schema", "schema": SCHEMA}, JsonOutput(SCHEMA)),
        ({"type": "json_schema", "schema": {}}, JsonOutput({})),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
         JsonOutput(SCHEMA)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_a_schema_is_enforced_wherever_it_stands(
    place: str, form: dict[str, Any], meant: JsonOutput | None
) -> None:
    assert output(place, form) == meant
    assert sent(place, form).ignored_names() == []


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "text", "schema": SCHEMA}, "schema"),
        ({"type": "text", "json_schema": {"schema": SCHEMA}}, "json_schema.schema"),
        ({"type": "json_object", "schema": SCHEMA, "json_schema": {"schema": SCHEMA}}, "schema"),
        ({"type": "json_object", "schema": {"x": "a" * 300_000}}, "schema"),
        ({"type": "json_object", "schema": 5}, "schema"),
        ({"type": "xml"}, "type"),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_a_form_that_means_nothing_is_refused_by_name(
    place: str, form: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        output(place, form)
    assert caught.value.param == f"{place}.{param}"


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_schema_is_named_where_the_api_documents_it(place: str) -> None:
    with pytest.raises(RequestError) as caught:
        output(place, {"type": "json_schema"})
    path = "json_schema.schema" if place == "response_format" else "schema"
    assert caught.value.param == f"{place}.{path}"


@pytest.mark.parametrize("place", PLACES)
def test_unknown_fields_of_a_format_are_named(place: str) -> None:
    assert f"{place}.flavour" in sent(place, {"type": "text", "flavour": 1}).ignored_names()


@pytest.mark.parametrize(
    ("form", "echoed"),
    [
        ({"type": "json_object", "schema": SCHEMA}, {"type": "json_object"}),
        ({"type": "json_schema", "schema": SCHEMA, "x": 1},
         {"type": "json_schema", "name": "schema", "schema": SCHEMA}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}},
         {"type": "json_schema", "name": "n", "strict": True, "schema": SCHEMA}),
    ],
)  # fmt: skip
async def test_an_answer_names_its_format_as_openai_does(
    form: dict[str, Any], echoed: dict[str, Any]
) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        body = {"model": "tiny", "input": "hi", "text": {"format": form}}
        answer = (await client.post("/v1/responses", json=body)).json()
    assert answer["text"]["format"] == echoed
    assert Response.model_validate(answer)
    assert dispatcher.requests[0].output == JsonOutput(SCHEMA)
