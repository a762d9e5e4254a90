"""What lies in a history of chat completions is read, noted or adapted, but never refused."""

import json
from typing import Any

import pytest

from core.types import ChatMessage, ChatPrompt, ToolCall
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services, make_view
from tests.live_server import client_of

USER = {"role": "user", "content": "look"}
CALL = {"id": "c", "type": "function", "function": {"name": "view", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


async def sent(*messages: dict[str, Any], **more: Any) -> tuple[Any, FakeDispatcher]:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        body = {"model": "tiny", "messages": messages, **more}
        return await client.post("/v1/chat/completions", json=body), dispatcher


async def read(*messages: dict[str, Any]) -> tuple[tuple[ChatMessage, ...], str]:
    """Return the messages of the prompt, and the header of ignored names."""
    response, dispatcher = await sent(*messages)
    assert response.status_code == 200, response.text
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt.messages, response.headers.get("x-impetus-ignored", "")


@pytest.mark.parametrize(
    ("part", "note"),
    [
        (IMAGE, "[an image, which this model cannot see]"),
        ({"type": "input_audio", "input_audio": {}}, "[a sound, which this model cannot read]"),
        ({"type": "file", "file": {"file_id": "f"}}, "[a file, which this model cannot read]"),
        ({"type": "hologram"}, "[content of type hologram, which this model cannot read]"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("place", ["earlier", "result", "system", "answer"])
async def test_an_unreadable_part_of_a_history_becomes_a_note(
    place: str, part: dict[str, Any], note: str
) -> None:
    content = [{"type": "text", "text": "before"}, part]
    histories: dict[str, list[dict[str, Any]]] = {
        "earlier": [{"role": "user", "content": content}, {"role": "assistant"}, USER],
        "result": [USER, CALLING, {"role": "tool", "tool_call_id": "c", "content": content}],
        "system": [{"role": "system", "content": content}, USER],
        "answer": [USER, {"role": "assistant", "content": content}, USER],
    }
    messages, ignored = await read(*histories[place])
    assert f"before\n{note}" in [message.content for message in messages]
    assert ignored == f"messages.content.{part['type']}"


@pytest.mark.parametrize(
    "later", [[], [CALLING, {"role": "tool", "tool_call_id": "c", "content": "x"}]]
)
async def test_an_image_that_the_user_sends_now_is_refused(later: list[dict[str, Any]]) -> None:
    response, dispatcher = await sent(USER, {"role": "user", "content": [IMAGE]}, *later)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_capability")
    assert error["param"] == "messages[1].content[0]"
    assert "no model on this server" in error["message"]
    assert not dispatcher.requests


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"a": 1}, '{"a": 1}'),
        ([1], "[1]"),
        (None, ""),
        ("", ""),
        ('{"a', '{"a'),
        (json.dumps('{"a": 1}'), json.dumps('{"a": 1}')),
    ],
)
async def test_arguments_of_any_kind_are_kept_as_text(arguments: Any, kept: str) -> None:
    function = {"name": "view", "arguments": arguments}
    calling = {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}
    messages, _ = await read(USER, calling, {"role": "tool", "tool_call_id": "c", "content": "x"})
    assert messages[1].tool_calls == (ToolCall("c", "view", kept),)


async def test_calls_of_older_and_newer_clients_are_read() -> None:
    messages, _ = await read(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "tool", "content": None},
        {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** é"}}]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "done"}]},
        USER,
    )  # fmt: skip
    assert messages[1].tool_calls == (ToolCall("", "f", "{}"),)
    assert messages[2] == ChatMessage("tool", "")
    assert messages[3].tool_calls == (ToolCall("c", "patch", '{"input": "*** é"}'),)


async def test_a_call_without_a_function_is_refused_by_name() -> None:
    response, _ = await sent(USER, {"role": "assistant", "tool_calls": [{"id": "c"}]}, USER)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[1].tool_calls[0].function"


async def test_earlier_sound_becomes_a_note() -> None:
    messages, ignored = await read(USER, {"role": "assistant", "audio": {"id": "a"}}, USER)
    assert messages[1].content == "[a sound, which this model cannot read]"
    assert ignored == "messages.content.audio"


STARTED = {"role": "assistant", "content": "1, 2,"}


async def test_the_last_answer_is_continued_where_it_is_asked_for() -> None:
    response, dispatcher = await sent(
        USER, STARTED, continue_final_message=True, add_generation_prompt=False
    )
    prompt = dispatcher.requests[0].prompt
    assert response.status_code == 200
    assert "x-impetus-ignored" not in response.headers
    assert isinstance(prompt, ChatPrompt)
    assert prompt.continues_answer


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ((USER,), {"continue_final_message": True}, "continue_final_message"),
        ((USER, CALLING), {"continue_final_message": True}, "continue_final_message"),
        ((USER, STARTED), {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            (USER, STARTED),
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
    ],
)
async def test_what_cannot_be_continued_is_refused(
    messages: tuple[dict[str, Any], ...], fields: dict[str, bool], param: str
) -> None:
    response, _ = await sent(*messages, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def prompt_with(
    *messages: dict[str, Any], server: bool, model: bool | None, path: str, **more: Any
) -> ChatPrompt:
    dispatcher = FakeDispatcher()
    views = [make_view(continue_answers=model)]
    services = make_services(dispatcher, views=views, continue_answers=server)
    async with client_of(create_app(services)) as client:
        body = {"model": "tiny", "messages": messages, **more}
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    is_chat = path.endswith("completions")
    prompt = dispatcher.requests[0].prompt if is_chat else dispatcher.tokenized[0][1]
    assert isinstance(prompt, ChatPrompt)
    return prompt


PATHS = ["/v1/chat/completions", "/tokenize", "/apply-template"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("server", "model", "more", "expected"),
    [
        (False, None, {}, False),
        (True, None, {}, True),
        (False, True, {}, True),
        (True, False, {}, False),
        (False, False, {"continue_final_message": True}, True),
        (True, True, {"continue_final_message": False}, False),
        (True, None, {"add_generation_prompt": True}, False),
        (True, None, {"continue_final_message": None}, True),
    ],
)
async def test_settings_say_whether_an_answer_is_continued_if_the_request_does_not(
    path: str, server: bool, model: bool | None, more: dict[str, Any], expected: bool
) -> None:
    prompt = await prompt_with(USER, STARTED, server=server, model=model, path=path, **more)
    assert prompt.continues_answer is expected
    assert prompt.messages[-1].content == "1, 2,"


@pytest.mark.parametrize("messages", [(USER,), (USER, CALLING), (USER, STARTED, USER)], ids=len)
async def test_only_an_answer_at_the_end_is_continued_by_a_setting(
    messages: tuple[dict[str, Any], ...],
) -> None:
    for path in PATHS:
        prompt = await prompt_with(*messages, server=True, model=None, path=path)
        assert not prompt.continues_answer


async def test_begun_reasoning_and_formats_are_continued_by_a_setting() -> None:
    thinking = {"role": "assistant", "content": None, "reasoning_content": "I see"}
    prompt = await prompt_with(USER, thinking, server=True, model=None, path=PATHS[0])
    assert prompt.continues_answer
    assert prompt.messages[-1].reasoning == "I see"
    begun = {"role": "assistant", "content": '{"a": 1'}
    form = {"response_format": {"type": "json_object"}}
    prompt = await prompt_with(USER, begun, server=True, model=None, path=PATHS[0], **form)
    assert prompt.continues_answer


async def test_documents_reach_the_prompt() -> None:
    documents = ["plain", {"title": "T", "text": "x", "year": 2020}]
    for path in PATHS:
        prompt = await prompt_with(USER, server=False, model=None, path=path, documents=documents)
        assert prompt.documents == ({"text": "plain"}, documents[1])
    offs: tuple[list[str] | None, ...] = (None, [])
    for off in offs:
        prompt = await prompt_with(USER, server=False, model=None, path=PATHS[0], documents=off)
        assert prompt.documents == ()


@pytest.mark.parametrize("documents", ["text", [1], [None], [["x"]], ["x"] * 3000, {"text": "x"}])
async def test_what_are_no_documents_is_refused(documents: Any) -> None:
    response, dispatcher = await sent(USER, documents=documents)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("documents")
    assert not dispatcher.requests
