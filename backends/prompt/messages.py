"""Converts chat messages into the structures that templates read, and into plain text."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from core.text import is_nested_deeper, well_formed
from core.types import ChatMessage, JsonValue, Tool

TOOL_RESPONSE = "<tool_response>\n{}\n</tool_response>"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "User"}


def template_message(message: ChatMessage, *, as_parts: bool) -> dict[str, JsonValue]:
    """Return `message` in the structure of Hugging Face chat templates; arguments are objects."""
    content: JsonValue = message.content
    if as_parts:
        content = [{"type": "text", "text": message.content}]
    result: dict[str, JsonValue] = {"role": message.role, "content": content}
    if message.name is not None:
        result["name"] = message.name
    if message.reasoning is not None:
        result["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def template_tool(tool: Tool) -> dict[str, JsonValue]:
    """Return `tool` in the structure of chat templates."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            # Without parameters there is no schema; templates read the properties of one.
            "parameters": dict(tool.parameters) or {"type": "object", "properties": {}},
        },
    }


def with_tools_in_text(
    messages: Sequence[ChatMessage], tools: Sequence[Tool]
) -> tuple[ChatMessage, ...]:
    """Write tools, calls and results into the messages, for templates that support none of them.

    Uses the format of the Hermes models: the tools as a JSON list within <tools> at the end of
    the system message, calls within <tool_call>, results within <tool_response> as a user message.
    """
    result: list[ChatMessage] = []
    for is_response, group in groupby(messages, key=lambda message: message.role == "tool"):
        if is_response:
            texts = (TOOL_RESPONSE.format(message.content) for message in group)
            result.append(ChatMessage("user", "\n".join(texts)))
        else:
            result += map(_with_calls_in_text, group)
    return _with_system_part(result, _tools_text(tools)) if tools else tuple(result)


def _with_calls_in_text(message: ChatMessage) -> ChatMessage:
    if not message.tool_calls:
        return message
    written = [_call_text(call.name, call.arguments) for call in message.tool_calls]
    text = "\n".join(part for part in (message.content, *written) if part)
    return replace(message, content=text, tool_calls=())


def with_folded_system(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Merge system messages into the next user message, and join messages of the same role."""
    groups: list[list[ChatMessage]] = []
    system: list[str] = []
    for message in messages:
        if message.role == "system":
            system.append(message.content)
            continue
        if message.role == "user":
            message = replace(message, content="\n\n".join([*system, message.content]))
            system.clear()
        if groups and _can_join(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    if system:
        groups.append([ChatMessage("user", "\n\n".join(system))])
    return tuple(_joined(group) for group in groups)


def _joined(group: Sequence[ChatMessage]) -> ChatMessage:
    """Return the first message with the texts of all."""
    if len(group) == 1:
        return group[0]
    return replace(group[0], content="\n\n".join(message.content for message in group))


def plain_text(messages: Sequence[ChatMessage]) -> str:
    """Return a conversation as `User: …` and `Assistant: …` lines, for a model without template."""
    lines = [
        f"{_PLAIN_NAMES[message.role]}: {message.content}\n"
        + ("\n" if message.role == "system" else "")
        for message in messages
    ]
    return "".join(lines) + "Assistant:"


def call_arguments(text: str) -> JsonValue:
    """Parse a call's arguments as JSON; invalid JSON, and JSON of over 200 levels, stays text.

    Nothing and null are no arguments; an object that was encoded twice is decoded twice.  Lone
    surrogates become U+FFFD.
    """
    value = _decoded(text)
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    inner = _decoded(value) if isinstance(value, str) else None
    return inner if isinstance(inner, dict) else value


def _decoded(text: str) -> JsonValue:
    try:
        # Text that is not JSON fails at once; only what parses is worth measuring.
        value: JsonValue = json.loads(text)
        if is_nested_deeper(text):
            return text
        if _SURROGATE.search(text):
            value = json.loads(well_formed(json.dumps(value, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return text
    return value


def _call_text(name: str, arguments: str) -> str:
    call = {"name": name, "arguments": call_arguments(arguments)}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _tools_text(tools: Sequence[Tool]) -> str:
    listed = json.dumps([template_tool(tool) for tool in tools], ensure_ascii=False)
    return (
        "You can call functions. These are available:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call a function, write one JSON object with its name and arguments within "
        "<tool_call> tags:\n"
        '<tool_call>\n{"name": "function name", "arguments": {"parameter": "value"}}\n'
        "</tool_call>\n"
        "Its result comes back within <tool_response> tags. Without need of a function, "
        "answer directly."
    )


def _with_system_part(messages: Sequence[ChatMessage], text: str) -> tuple[ChatMessage, ...]:
    if messages and messages[0].role == "system":
        content = f"{messages[0].content}\n\n{text}" if messages[0].content else text
        return (replace(messages[0], content=content), *messages[1:])
    return (ChatMessage("system", text), *messages)


def _can_join(first: ChatMessage, second: ChatMessage) -> bool:
    return (
        first.role == second.role
        and first.role != "tool"
        and not first.tool_calls
        and not second.tool_calls
    )
