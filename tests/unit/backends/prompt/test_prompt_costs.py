"""A hostile history costs no more than its parsing: work is counted, never timed."""

from dataclasses import replace
from typing import Any

import pytest

from backends.prompt import call_ids, messages
from backends.prompt.call_ids import with_short_call_ids
from backends.prompt.messages import with_folded_system, with_tools_in_text
from core.text import is_nested_deeper
from core.types import ChatMessage, ToolCall

COUNT = 300
TEXT = "x" * 100


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the lengths of the texts of all messages that are made."""
    lengths: list[int] = []

    def made(*args: Any, **more: Any) -> ChatMessage:
        message = ChatMessage(*args, **more)
        lengths.append(len(message.content))
        return message

    def changed(message: Any, **changes: Any) -> Any:
        lengths.append(len(changes.get("content", "")))
        return replace(message, **changes)

    monkeypatch.setattr(messages, "ChatMessage", made)
    monkeypatch.setattr(messages, "replace", changed)
    return lengths


def test_results_in_text_are_joined_once(copied: list[int]) -> None:
    history = [ChatMessage("tool", TEXT, tool_call_id=f"c{index}") for index in range(COUNT)]
    (joined,) = with_tools_in_text(history, ())
    assert joined.role == "user"
    assert joined.content.count(TEXT) == joined.content.count("<tool_response>") == COUNT
    assert sum(copied) <= 2 * len(joined.content)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_messages_of_one_role_are_joined_once(role: Any, copied: list[int]) -> None:
    (joined,) = with_folded_system([ChatMessage(role, TEXT)] * COUNT)
    assert joined.content == "\n\n".join([TEXT] * COUNT)
    assert joined.role == ("user" if role == "system" else role)
    assert sum(copied) <= 2 * len(joined.content)


def test_groups_are_told_apart() -> None:
    call = ToolCall("c", "f", "{}")
    history = [
        ChatMessage("tool", "a"),
        ChatMessage("tool", "b"),
        ChatMessage("user", "c"),
        ChatMessage("assistant", "d", tool_calls=(call,)),
        ChatMessage("tool", "e"),
    ]
    texts = [message.content for message in with_tools_in_text(history, ())]
    assert [text.replace("\n", "") for text in texts] == [
        "<tool_response>a</tool_response><tool_response>b</tool_response>",
        "c",
        'd<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "<tool_response>e</tool_response>",
    ]
    assert [message.content for message in with_folded_system(history)][2:4] == ["c", "d"]


@pytest.mark.parametrize(
    ("text", "measured"),
    [("[]" * 1000, 0), ("[" * 100_000, 0), ('{"a": ', 0), ("[" * 201 + "]" * 201, 1)],
)
def test_only_arguments_that_parse_are_measured(
    text: str, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counted(one: str) -> bool:
        seen.append(one)
        return is_nested_deeper(one)

    monkeypatch.setattr(messages, "is_nested_deeper", counted)
    assert messages.call_arguments(text) == text
    # The text is decoded once more, in case it was encoded twice.
    assert len(seen) == 2 * measured


@pytest.mark.parametrize(
    ("text", "is_deeper"),
    [
        ("[" * 200 + "]" * 200, False),
        ("[" * 201 + "]" * 201, True),
        ('{"a":' * 201, True),
        ("[]" * 1000, False),
        ('["' + "[" * 1000 + '"]', False),
        ('["\\"' + "[" * 1000 + '"]', False),
        ('"' + "[" * 1000, False),
        ('"\\' + "[" * 1000, False),
        ("]" * 50 + "[" * 250, False),
        ("]" * 50 + "[" * 251, True),
        ("", False),
    ],
)
def test_depth_is_counted_outside_of_strings(text: str, is_deeper: bool) -> None:
    assert is_nested_deeper(text) is is_deeper


def test_ids_that_collide_after_rewriting_are_hashed_once_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = call_ids._short
    hashed: list[str] = []

    def counted(text: str) -> str:
        hashed.append(text)
        return short(text)

    # Every id that "old" could become is taken, and so for each of those that follow from it.
    taken = [short("old"), *(short(f"old {attempt}") for attempt in range(1, COUNT))]
    old = ["old", *(f"old {attempt}" for attempt in range(1, COUNT))]
    calls = tuple(ToolCall(one, "f", "{}") for one in (*taken, *old))
    results = [ChatMessage("tool", "", tool_call_id=call.id) for call in calls]
    monkeypatch.setattr(call_ids, "_short", counted)
    calling, *answered = with_short_call_ids([ChatMessage("assistant", "", tool_calls=calls),
                                              *results])  # fmt: skip
    new = [call.id for call in calling.tool_calls]
    assert new[:COUNT] == taken
    assert len(set(new)) == len(new)
    assert [message.tool_call_id for message in answered] == new
    assert len(hashed) <= 4 * COUNT
