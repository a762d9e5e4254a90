"""Tests of Apple's forms of conversations and schemas."""

import uuid
from typing import Any

import pytest

from backends.apple.transcript import (
    Conversation,
    Turn,
    call_schema,
    guided_schema,
    read_conversation,
    transcript,
)
from core.errors import RequestError, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, Tool, ToolCall

USER = ChatMessage("user", "Hi")


def read(*messages: ChatMessage, **options: Any) -> Conversation:
    return read_conversation(ChatPrompt(messages, **options))


def guided(**schema: Any) -> dict[str, Any]:
    return guided_schema({"type": "object", **schema}, "response_format")


def test_last_user_message_is_the_prompt() -> None:
    conversation = read(USER, ChatMessage("assistant", "Hello"), ChatMessage("user", "Bye"))
    assert conversation == Conversation("", (Turn(True, "Hi"), Turn(False, "Hello")), "Bye")


def test_system_messages_are_the_instructions_wherever_they_stand() -> None:
    conversation = read(
        ChatMessage("system", "A"), USER, ChatMessage("system", ""), ChatMessage("system", "B")
    )
    assert conversation == Conversation("A\n\nB", (), "Hi")


def test_neighbours_of_one_role_are_joined() -> None:
    conversation = read(
        USER, USER, ChatMessage("assistant", "a"), ChatMessage("assistant", "b"), USER
    )
    assert conversation == Conversation("", (Turn(True, "Hi\n\nHi"), Turn(False, "a\n\nb")), "Hi")


def test_tools_calls_and_results_are_text() -> None:
    call = ToolCall("call_1", "clock", '{"zone": "UTC"}')
    conversation = read(
        USER,
        ChatMessage("assistant", "", tool_calls=(call,)),
        ChatMessage("tool", "12:00", tool_call_id="call_1"),
        tools=(Tool("clock"),),
    )
    assert '"name": "clock"' in conversation.instructions
    assert '{"name": "clock", "arguments": {"zone": "UTC"}}' in conversation.history[1].text
    assert conversation.prompt == "<tool_response>\n12:00\n</tool_response>"


def test_tools_that_may_not_be_called_are_not_offered() -> None:
    assert read(USER, tools=(Tool("clock"),), tool_choice="none").instructions == ""


@pytest.mark.parametrize(
    "messages",
    [
        (),
        (ChatMessage("system", "A"),),
        (USER, ChatMessage("assistant", "Hello")),
        (ChatMessage("user", " \n"),),
    ],
)
def test_conversation_without_a_last_question_is_refused(
    messages: tuple[ChatMessage, ...],
) -> None:
    with pytest.raises(RequestError) as caught:
        read(*messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("role", ["system", "user"])
def test_text_that_c_would_cut_is_refused(role: Any) -> None:
    with pytest.raises(RequestError, match="NUL"):
        read(ChatMessage(role, "a\0b"), USER)


def test_transcript_has_apples_form() -> None:
    document: dict[str, Any] = transcript(
        Conversation("Be brief.", (Turn(True, "Hi"), Turn(False, "Hello")), "Bye")
    )
    entries = document["transcript"]["entries"]
    assert (document["version"], document["type"]) == (1, "FoundationModels.Transcript")
    assert [entry["role"] for entry in entries] == ["instructions", "user", "response"]
    assert [entry["contents"][0]["text"] for entry in entries] == ["Be brief.", "Hi", "Hello"]
    assert (entries[0]["tools"], entries[1]["options"], entries[2]["assets"]) == ([], {}, [])
    ids = {uuid.UUID(e["id"]) for e in entries} | {
        uuid.UUID(e["contents"][0]["id"]) for e in entries
    }
    assert len(ids) == 6


def test_transcript_without_instructions_begins_with_the_user() -> None:
    document: dict[str, Any] = transcript(Conversation("", (Turn(True, "Hi"),), "Bye"))
    assert [entry["role"] for entry in document["transcript"]["entries"]] == ["user"]


def test_objects_are_closed_and_ordered() -> None:
    inner = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}
    schema = guided(
        properties={"list": {"type": "array", "items": inner}, "one": {"$ref": "#/$defs/one"}},
        required=["list"],
        **{"$defs": {"one": inner}, "$schema": "https://json-schema.org/draft/2020-12/schema"},
    )
    assert schema["title"] == "Answer"
    assert schema["required"] == ["list"]
    assert schema["x-order"] == ["list", "one"]
    assert schema["additionalProperties"] is False
    assert "$schema" not in schema
    item, definition = schema["properties"]["list"]["items"], schema["$defs"]["one"]
    assert (item["title"], definition["title"]) == ("Item", "one")
    assert item["x-order"] == definition["x-order"] == ["z", "a"]
    assert item["required"] == []


def test_schema_that_was_given_stays_as_it_is() -> None:
    given: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
    guided_schema(given, "tools")
    assert given == {"type": "object", "properties": {"a": {"type": "string"}}}


def test_annotations_go_and_titles_stay() -> None:
    text = {"type": "string", "default": "x", "examples": ["y"], "description": "z"}
    schema = guided(title="Mine", properties={"a": text})
    assert schema["title"] == "Mine"
    assert schema["properties"]["a"] == {"type": "string", "description": "z"}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "format": "email"}}},
        {"properties": {"a": {"type": ["string", "null"]}}},
        {"properties": {"a": {"type": "null"}}},
        {"properties": {"a": {"oneOf": []}}},
        {"properties": {"a": {"anyOf": {}}}},
        {"properties": {"a": {"anyOf": [{"not": {}}]}}},
        {"properties": {"a": {"type": "array", "items": True}}},
        {"properties": []},
        {"properties": {"a": True}},
        {"additionalProperties": True},
        {"additionalProperties": {"type": "string"}},
        {"$defs": {"a": {"const": 1}}},
        {"patternProperties": {}},
    ],
)
def test_what_cannot_be_enforced_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        guided(**schema)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("schema", [{}, {"type": "array"}, {"anyOf": []}])
def test_root_that_is_no_object_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter, match="root"):
        guided_schema(schema, "tools")


def test_nesting_is_bounded() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UnsupportedParameter, match="nested"):
        guided(properties={"a": schema})


def test_choice_of_a_tool_is_one_of_the_names() -> None:
    schema: dict[str, Any] = call_schema(["a", "b"])
    assert schema["properties"] == {"name": {"type": "string", "enum": ["a", "b"]}}
    assert schema["required"] == ["name"]
