"""Content blocks that a text model cannot read: noted in a history, refused when asked about."""

import base64
from typing import Any

import pytest

from core.types import ChatMessage, ChatPrompt
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
PDF = {
    "type": "document",
    "title": "a.pdf",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"},
}
SEEN = "[an image, which this model cannot see]"
CALL = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"file_path": "a.png"}}
SERVER_BLOCKS: list[tuple[dict[str, Any], str]] = [
    (
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        '[the tool web_search was called with {"query": "q"}]',
    ),
    (
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s",
            "content": [
                {"type": "web_search_result", "title": "T", "url": "u", "encrypted_content": "XX"}
            ],
        },
        "[result of web_search]\nT\nu",
    ),
    (
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s",
            "content": {"type": "web_search_tool_result_error", "error_code": "unavailable"},
        },
        "[result of web_search]\nunavailable",
    ),
    (
        {
            "type": "web_fetch_tool_result",
            "tool_use_id": "s",
            "content": {
                "type": "web_fetch_result",
                "url": "u",
                "content": {
                    "type": "document",
                    "source": {"type": "text", "media_type": "text/plain", "data": "page"},
                },
            },
        },
        "[result of web_fetch]\nu\npage",
    ),
    (
        {
            "type": "code_execution_tool_result",
            "tool_use_id": "s",
            "content": {
                "type": "code_execution_result",
                "stdout": "out",
                "stderr": "err",
                "return_code": 0,
                "content": [],
            },
        },
        "[result of code_execution]\nout\nerr",
    ),
    (
        {"type": "mcp_tool_use", "id": "m", "name": "n", "server_name": "s", "input": {}},
        "[the tool n was called with {}]",
    ),
    (
        {"type": "mcp_tool_result", "tool_use_id": "m", "content": [{"type": "text", "text": "r"}]},
        "[result of mcp]\nr",
    ),
    ({"type": "compaction", "content": "We spoke."}, "We spoke."),
    ({"type": "compaction", "content": "We spoke.", "encrypted_content": None}, "We spoke."),
    ({"type": "compaction", "content": None}, ""),
    ({"type": "redacted_thinking", "data": "XX"}, ""),
    ({"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}, ""),
]
NOTED = [
    (IMAGE, SEEN, "image"),
    ({"type": "image"}, SEEN, "image"),
    (PDF, "[a document named a.pdf, which this model cannot read]", "document"),
    (
        {"type": "document", "source": {"type": "url", "url": "http://x"}},
        "[a document, which this model cannot read]",
        "document",
    ),
    (
        {"type": "container_upload", "file_id": "f"},
        "[an uploaded file, which this model cannot read]",
        "container_upload",
    ),
    ({"type": "nova"}, "[content of type nova, which this model cannot read]", "nova"),
]
TEXTS = [
    (
        {
            "type": "document",
            "title": "T",
            "context": "C",
            "source": {"type": "text", "media_type": "text/plain", "data": "körper"},
        },
        "Document: T\nC\nkörper",
    ),
    (
        {
            "type": "document",
            "source": {
                "type": "base64",
                "media_type": "text/plain",
                "data": base64.b64encode("ä".encode()).decode(),
            },
        },
        "ä",
    ),
    ({"type": "document", "source": {"type": "content", "content": "one"}}, "one"),
    (
        {
            "type": "document",
            "source": {"type": "content", "content": [{"type": "text", "text": "two"}]},
        },
        "two",
    ),
    (
        {
            "type": "search_result",
            "title": "T",
            "source": "u",
            "content": [{"type": "text", "text": "found"}],
        },
        "Search result: T (u)\nfound",
    ),
]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


async def sent(messages: Any, **fields: Any) -> tuple[ChatPrompt, set[str]]:
    """Return the prompt that reached the engine, and the ignored names; all must be answered."""
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        body = {"model": "tiny", "max_tokens": 9, "messages": messages, **fields}
        response = await client.post("/v1/messages", json=body)
        assert response.status_code == 200, response.text
        count = await client.post("/v1/messages/count_tokens", json=body)
        assert count.status_code == 200
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert dispatcher.counted == [prompt]
    names = response.headers.get("x-impetus-ignored", "")
    return prompt, set(filter(None, names.split(", ")))


@pytest.mark.parametrize(("block", "note", "name"), NOTED)
async def test_unreadable_block_of_a_tool_becomes_a_note_c19(
    block: dict[str, Any], note: str, name: str
) -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [block, text("done")]}
    history = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [result]},
    ]
    prompt, ignored = await sent(history)
    assert prompt.messages[2] == ChatMessage("tool", f"{note}\ndone", tool_call_id="t1")
    assert ignored == {f"messages.content.{name}"}


@pytest.mark.parametrize(("block", "note", "name"), NOTED)
@pytest.mark.parametrize("role", ["user", "assistant"])
async def test_unreadable_block_further_back_becomes_a_note(
    block: dict[str, Any], note: str, name: str, role: str
) -> None:
    history = [
        {"role": role, "content": [text("See"), block]},
        {"role": "user", "content": "Never mind."},
    ]
    prompt, ignored = await sent(history)
    assert prompt.messages[0].content == f"See\n{note}"
    assert ignored == {f"messages.content.{name}"}


@pytest.mark.parametrize("block", [block for block, _, _ in NOTED])
async def test_unreadable_block_that_the_user_sends_now_is_refused(block: dict[str, Any]) -> None:
    dispatcher = FakeDispatcher()
    messages = [{"role": "user", "content": [text("What is in it?"), block]}]
    async with client_of(create_app(make_services(dispatcher))) as client:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            body = {"model": "tiny", "max_tokens": 9, "messages": messages}
            response = await client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["type"]) == (400, "invalid_request_error")
            assert f"messages[0].content[1]: content of type '{block['type']}'" in error["message"]
    assert dispatcher.requests == []


@pytest.mark.parametrize(("block", "content"), TEXTS)
async def test_block_with_text_is_read_wherever_it_is(block: dict[str, Any], content: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [block]}
    messages = [{"role": "user", "content": [block]}]
    prompt, ignored = await sent(messages)
    assert (prompt.messages, ignored) == ((ChatMessage("user", content),), set())
    prompt, ignored = await sent([{"role": "user", "content": [result]}])
    assert prompt.messages == (ChatMessage("tool", content, tool_call_id="t1"),)
    assert ignored == set()


async def test_image_inside_a_document_is_noted_or_refused_as_any_other() -> None:
    source = {"type": "content", "content": [text("one"), IMAGE]}
    history = [
        {"role": "user", "content": [{"type": "document", "source": source}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "On."},
    ]
    prompt, ignored = await sent(history)
    assert prompt.messages[0].content == f"one\n{SEEN}"
    assert ignored == {"messages.content.image"}
    with pytest.raises(AssertionError, match="content of type 'image'"):
        await sent(history[:1])


@pytest.mark.parametrize(("block", "content"), SERVER_BLOCKS)
async def test_block_of_a_server_tool_becomes_text(block: dict[str, Any], content: str) -> None:
    history = [
        {"role": "assistant", "content": [block, text("So.")]},
        {"role": "user", "content": "On."},
    ]
    prompt, ignored = await sent(history)
    assert prompt.messages[0].content == (f"{content}\nSo." if content else "So.")
    assert ignored == set()


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        ({"a": 1}, '{"a": 1}'),
        (None, "{}"),
        ("", "{}"),
        ('{"a": 1}', '{"a": 1}'),
        ('{"a": ', '{"arguments": "{\\"a\\": "}'),
        ("[1]", '{"arguments": "[1]"}'),
        ([1, 2], '{"arguments": [1, 2]}'),
        (5, '{"arguments": 5}'),
    ],
)
async def test_arguments_of_an_earlier_call_are_an_object_whatever_was_written(
    value: Any, arguments: str
) -> None:
    call = {**CALL, "input": value}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "x"}
    history = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    prompt, _ = await sent(history)
    assert prompt.messages[0].tool_calls[0].arguments == arguments


async def test_tools_of_anthropic_are_left_out_and_named() -> None:
    own = {"name": "read", "input_schema": {"type": "object"}}
    tools = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        own,
        {"type": "mcp_toolset", "mcp_server_name": "s"},
    ]
    hi = [{"role": "user", "content": "hi"}]
    prompt, ignored = await sent(hi, tools=tools)
    assert [tool.name for tool in prompt.tools] == ["read"]
    assert ignored == {"tools.web_search_20250305", "tools.mcp_toolset"}
    for tool_choice in ({"type": "tool", "name": "web_search"}, {"type": "any"}):
        with pytest.raises(AssertionError, match="web_search_20250305"):
            await sent(hi, tools=tools[:1], tool_choice=tool_choice)


@pytest.mark.parametrize(("clear_at", "texts"), [
    (None, ["hi", "Briefly.", "x", "on"]),
    ("never", ["hi", "Briefly.", "x", "on"]),
    ("next_user_message", ["hi", "x", "on"]),
])  # fmt: skip
async def test_system_message_is_shown_as_long_as_it_says(
    clear_at: str | None, texts: list[str]
) -> None:
    user = {"role": "user", "content": "hi"}
    system = {"role": "system", "content": "Briefly.", "clear_at": clear_at}
    history = [user, system, {"role": "assistant", "content": "x"}, {**user, "content": "on"}]
    prompt, _ = await sent(history)
    assert [message.content for message in prompt.messages] == texts
    now, _ = await sent(history[:2])
    assert [message.content for message in now.messages] == ["hi", "Briefly."]


async def test_system_message_may_have_nothing_to_show() -> None:
    hi = {"role": "user", "content": "hi"}
    prompt, ignored = await sent([hi, {"role": "system", "output_config": {"effort": "low"}}])
    assert prompt.messages == (ChatMessage("user", "hi"),)
    assert ignored == {"messages.output_config"}
    with pytest.raises(AssertionError, match="content: required"):
        await sent([{"role": "user"}])
