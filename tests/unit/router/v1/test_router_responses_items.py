"""Items of a history in the Responses API: other tools' calls, unreadable parts, odd fields."""

import base64
from typing import Any

import pytest

from core.types import ChatMessage, ChatPrompt, ToolCall
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of, error_of

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
NOTE = "[an image, which this model cannot see]"
NOW = {"role": "user", "content": "go on"}
FILE = "data:text/plain;base64," + base64.b64encode("grüß".encode()).decode()


async def posted(items: Any) -> tuple[Any, FakeDispatcher]:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        return await client.post(
            "/v1/responses", json={"model": "tiny", "input": items}
        ), dispatcher


async def messages_of(items: list[Any]) -> tuple[ChatMessage, ...]:
    response, dispatcher = await posted([*items, NOW])
    assert response.status_code == 200, response.text
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[-1] == ChatMessage("user", "go on")
    return prompt.messages[:-1]


@pytest.mark.parametrize(
    ("items", "calls", "results"),
    [
        ([{"type": "local_shell_call", "id": "l", "call_id": "c", "status": "completed",
           "action": {"type": "exec", "command": ["ls"], "env": {}}},
          {"type": "local_shell_call_output", "call_id": "c", "output": "a.txt"}],
         [ToolCall("c", "local_shell", '{"type": "exec", "command": ["ls"], "env": {}}')],
         ["a.txt"]),
        ([{"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
          {"type": "shell_call_output", "call_id": "c", "output": [
              {"stdout": "x", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]}],
         [ToolCall("c", "shell", '{"commands": ["ls"]}')],
         ['[{"stdout": "x", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]']),
        ([{"type": "computer_call", "call_id": "c", "action": {"type": "click"}},
          {"type": "computer_call_output", "call_id": "c", "output": {
              "type": "computer_screenshot", "image_url": "data:image/png;base64,AAAA"}}],
         [ToolCall("c", "computer", '{"type": "click"}')],
         [f'{{"type": "computer_screenshot", "image_url": "{NOTE}"}}']),
        ([{"type": "tool_search_call", "call_id": "c", "arguments": {"query": "q"}},
          {"type": "tool_search_output", "call_id": "c", "tools": []}],
         [ToolCall("c", "tool_search", '{"query": "q"}')], [""]),
        ([{"type": "mcp_call", "id": "m", "server_label": "s", "name": "read",
           "arguments": '{"a": 1}', "output": "text"}],
         [ToolCall("call_0", "read", '{"a": 1}')], ["text"]),
        ([{"type": "code_interpreter_call", "id": "i", "code": "1+1", "container_id": "x",
           "outputs": [{"type": "logs", "logs": "2"}]}],
         [ToolCall("call_0", "code_interpreter", '{"code": "1+1", "container_id": "x"}')],
         ['[{"type": "logs", "logs": "2"}]']),
        ([{"type": "file_search_call", "id": "f", "queries": ["q"],
           "results": [{"type": "x", "text": "found"}]}],
         [ToolCall("call_0", "file_search", '{"queries": ["q"]}')], ["found"]),
    ],
)  # fmt: skip
async def test_calls_of_other_tools_are_kept(
    items: list[Any], calls: list[ToolCall], results: list[str]
) -> None:
    messages = await messages_of(items)
    assert [call for message in messages for call in message.tool_calls] == calls
    assert [message.content for message in messages if message.role == "tool"] == results


@pytest.mark.parametrize(
    "item",
    [
        {
            "type": "web_search_call",
            "id": "ws_1",
            "status": "completed",
            "action": {"type": "search"},
        },
        {"type": "image_generation_call", "id": "ig", "result": "A" * 1000},
        {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": [{"name": "x"}]},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "ghost_snapshot", "ghost_commit": {"id": 5}},
        {"type": "of_next_year", "content": 5, "role": {}, "output": 7, "call_id": 3},
    ],
)
async def test_items_without_text_are_skipped_and_named(item: dict[str, Any]) -> None:
    response, dispatcher = await posted([NOW, item, NOW])
    assert response.status_code == 200
    assert response.headers["x-impetus-ignored"] == "input[1]"
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [message.content for message in prompt.messages] == ["go on"] * 2
    alone, _ = await posted([item])
    assert (alone.status_code, error_of(alone)["param"]) == (400, "input")


async def test_parts_without_text_become_notes_in_a_history_and_are_refused_now() -> None:
    items = [
        {"role": "user", "content": [IMAGE, {"type": "input_text", "text": "see"}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [IMAGE]},
        {"role": "user", "content": [
            {"type": "input_file", "filename": "a.txt", "file_data": FILE},
            {"type": "input_text", "text": "and this"}]},
    ]  # fmt: skip
    response, dispatcher = await posted(items)
    assert response.headers["x-impetus-ignored"] == "input.content.input_image"
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [message.content for message in prompt.messages] == [
        f"{NOTE}\nsee", "", NOTE, "Document: a.txt\ngrüß\nand this",
    ]  # fmt: skip
    refused, dispatcher = await posted([*items, {"role": "user", "content": [IMAGE]}])
    error = error_of(refused)
    assert (refused.status_code, error["param"]) == (400, "input[4].content[0]")
    assert error["code"] == "unsupported_capability"
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    ("part", "note"),
    [
        ({"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"},
         "[a file named a.pdf, which this model cannot read]"),
        ({"type": "input_file", "file_id": "f"}, "[a file, which this model cannot read]"),
        ({"type": "input_audio"}, "[a sound, which this model cannot read]"),
        ({"type": "new_part"}, "[content of type new_part, which this model cannot read]"),
        ({"type": "refusal", "refusal": "no"}, "no"),
    ],
)  # fmt: skip
async def test_notes_say_what_was_there(part: dict[str, Any], note: str) -> None:
    (message,) = await messages_of([{"role": "user", "content": [part]}])
    assert message.content == note


async def test_odd_fields_of_a_history_are_taken() -> None:
    messages = await messages_of(
        [
            {"role": "assistant", "content": None},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": {"x": 1}},
            {"type": "function_call", "call_id": "b", "name": "f", "arguments": None},
            {"type": "function_call_output", "call_id": "a", "output": {"ok": True}},
            {"type": "function_call_output", "call_id": "b", "output": []},
        ]
    )
    assert messages == (
        ChatMessage(
            "assistant", "", tool_calls=(ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "f", "{}"))
        ),
        ChatMessage("tool", '{"ok": true}', tool_call_id="a"),
        ChatMessage("tool", "", tool_call_id="b"),
    )
