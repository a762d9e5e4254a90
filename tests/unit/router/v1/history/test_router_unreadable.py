"""Histories with unreadable parts and odd arguments: the same answer in every API."""

import base64
import json
from functools import lru_cache
from typing import Any

import pytest

from backends.prompt.messages import template_message
from core.types import ChatPrompt
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of

PATHS = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "completions": "/v1/completions",
}
PLACES = {"chat": "messages", "responses": "input", "messages": "messages"}
URL = "data:image/png;base64,AAAA"
IMAGES: dict[str, dict[str, Any]] = {
    "chat": {"type": "image_url", "image_url": {"url": URL}},
    "responses": {"type": "input_image", "image_url": URL},
    "messages": {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
}
NOTE = "[an image, which this model cannot see]"
# Parts that every API reads by its own name, and what becomes of them in a history.
NOTES: list[tuple[str | dict[str, str], str]] = [
    ({"chat": "image_url", "responses": "input_image", "messages": "image"}, NOTE),
    ({"chat": "input_audio", "responses": "input_audio", "messages": "audio"},
     "[a sound, which this model cannot read]"),
    ("video_url", "[a video, which this model cannot see]"),
    ("hologram", "[content of type hologram, which this model cannot read]"),
    ("x" * 60, f"[content of type {'x' * 50}…, which this model cannot read]"),
    ("a\nb", "[content of type a\\nb, which this model cannot read]"),
]  # fmt: skip


@lru_cache
def served() -> tuple[FakeDispatcher, Any]:
    """Return one server for all tests here, which takes much longer to make than to ask."""
    dispatcher = FakeDispatcher()
    return dispatcher, create_app(make_services(dispatcher))


async def post(api: str, history: list[Any]) -> tuple[Any, FakeDispatcher]:
    body: dict[str, Any] = {"model": "tiny", PLACES.get(api, "prompt"): history}
    if api == "messages":
        body["max_tokens"] = 9
    dispatcher, app = served()
    dispatcher.requests.clear()
    async with client_of(app) as client:
        return await client.post(PATHS[api], json=body), dispatcher


async def contents(api: str, history: list[Any]) -> tuple[list[str], str]:
    """Return the texts of the prompt's messages, and the header of ignored names."""
    response, dispatcher = await post(api, history)
    assert response.status_code == 200, response.text
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    texts = [message.content for message in prompt.messages]
    return texts, response.headers.get("x-impetus-ignored", "")


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts) or "go on"}


@pytest.mark.parametrize(("kind", "note"), NOTES)
@pytest.mark.parametrize("api", PLACES)
async def test_notes_and_names_are_the_same_in_all_apis(
    api: str, kind: str | dict[str, str], note: str
) -> None:
    kind = kind if isinstance(kind, str) else kind[api]
    texts, ignored = await contents(api, [user({"type": kind}), user()])
    assert texts == [note, "go on"]
    # Names in the header have at most 64 characters, and no others than of names.
    safe = kind.replace("\n", "_n") if len(kind) <= 50 else f"{kind[:50]}_"
    assert ignored == f"{PLACES[api]}.content.{safe}"[:64]


@pytest.mark.parametrize("role", ["system", "assistant"])
@pytest.mark.parametrize("api", PLACES)
async def test_an_image_of_another_role_becomes_a_note(api: str, role: str) -> None:
    texts, _ = await contents(api, [{"role": role, "content": [IMAGES[api]]}, user()])
    assert texts == [NOTE, "go on"]


async def test_an_image_in_the_system_prompt_becomes_a_note() -> None:
    dispatcher, app = served()
    dispatcher.requests.clear()
    async with client_of(app) as client:
        system = [{"type": "text", "text": "Be brief."}, IMAGES["messages"]]
        body = {"model": "tiny", "max_tokens": 9, "messages": [user()], "system": system}
        response = await client.post("/v1/messages", json=body)
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0].content == f"Be brief.\n{NOTE}"
    assert response.headers["x-impetus-ignored"] == "messages.content.image"


@pytest.mark.parametrize("api", PLACES)
async def test_what_the_user_sends_now_is_refused_in_the_same_words(api: str) -> None:
    response, dispatcher = await post(api, [user({"type": "text", "text": "?"}, IMAGES[api])])
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert message == (
        f"{PLACES[api]}[0].content[1]: content of type '{IMAGES[api]['type']}' cannot be read: no "
        "model on this server reads more than text. Leave it out, or send its content as text."
    )
    assert not dispatcher.requests


@pytest.mark.parametrize("api", PLACES)
async def test_a_text_without_text_is_refused_only_where_the_user_sends_it_now(api: str) -> None:
    empty = user({"type": "text"})
    texts, _ = await contents(api, [empty, user()])
    assert texts == ["", "go on"]
    response, _ = await post(api, [user(), empty])
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(".text: required")


def file_part(api: str, name: str, kind: str, data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    fields = {"filename": name, "file_data": f"data:{kind};base64,{encoded}"}
    match api:
        case "chat":
            return {"type": "file", "file": fields}
        case "responses":
            return {"type": "input_file", **fields}
    source = {"type": "base64", "media_type": kind, "data": encoded}
    return {"type": "document", "title": name, "source": source}


@pytest.mark.parametrize("api", PLACES)
async def test_a_text_file_is_read_also_now(api: str) -> None:
    part = file_part(api, "a.txt", "text/plain", "grüß".encode())
    assert await contents(api, [user(part)]) == (["Document: a.txt\ngrüß"], "")


@pytest.mark.parametrize("api", PLACES)
async def test_a_note_has_the_name_of_the_file(api: str) -> None:
    part = file_part(api, "a\u202e.pdf", "application/pdf", b"%PDF")
    texts, _ = await contents(api, [user(part), user()])
    what = "document" if api == "messages" else "file"
    assert texts[0] == f"[a {what} named a\\u202e.pdf, which this model cannot read]"


async def test_only_data_urls_of_other_items_become_notes() -> None:
    outputs = [{"stdout": 'data: {"a": 1}', "shot": URL}, {"pdf": "data:application/pdf;base64,AA"}]
    items = [
        {"type": "shell_call", "call_id": "c", "action": {"commands": ["curl"]}},
        {"type": "shell_call_output", "call_id": "c", "output": outputs},
        user(),
    ]
    texts, ignored = await contents("responses", items)
    assert json.loads(texts[1]) == [
        {"stdout": 'data: {"a": 1}', "shot": NOTE},
        {"pdf": "[a file, which this model cannot read]"},
    ]
    assert ignored == "input.content.file, input.content.image"


ARGUMENTS = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 500 + "1" + "}" * 500,
    "broken": '{"a": ',
    "empty": "",
    "list": "[1]",
    "number": "5",
    "null": "null",
    "twice": json.dumps('{"a": 1}'),
    "infinite": '{"a": 1e999}',
}


def called(api: str, arguments: str) -> list[Any]:
    match api:
        case "completions":
            return [f"f({arguments})"]
        case "responses":
            return [
                user(),
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
                {"type": "mcp_call", "id": "m", "name": "f", "arguments": arguments, "output": "x"},
            ]
        case "chat":
            function = {"name": "f", "arguments": arguments}
            call = {"id": "c", "type": "function", "function": function}
            result = {"role": "tool", "tool_call_id": "c", "content": "x"}
            return [user(), {"role": "assistant", "tool_calls": [call]}, result]
    use = {"type": "tool_use", "id": "c", "name": "f", "input": arguments}
    done = {"type": "tool_result", "tool_use_id": "c", "content": "x"}
    return [user(), {"role": "assistant", "content": [use]}, user(done)]


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("api", PATHS)
async def test_arguments_of_any_form_in_a_history_are_answered(api: str, arguments: str) -> None:
    response, dispatcher = await post(api, called(api, arguments))
    assert response.status_code == 200, response.text
    prompt = dispatcher.requests[0].prompt
    if isinstance(prompt, ChatPrompt):
        rendered = json.dumps([template_message(one, as_parts=False) for one in prompt.messages])
        assert rendered.count('"name": "f"') == (2 if api == "responses" else 1)
