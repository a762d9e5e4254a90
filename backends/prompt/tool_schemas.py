"""Gives arguments and parameters of tools the plain form that every chat template can read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from backends.prompt.messages import call_arguments
from core.types import ChatMessage, JsonValue, Tool, ToolCall


def with_object_arguments(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages with an object as each call's arguments; other values lie in it.

    Many templates walk through the arguments as a mapping, but a model may have written anything.
    """
    return tuple(
        replace(message, tool_calls=tuple(map(_with_object, message.tool_calls)))
        if message.tool_calls
        else message
        for message in messages
    )


def _with_object(call: ToolCall) -> ToolCall:
    if isinstance(call_arguments(call.arguments), dict):
        return call
    return replace(call, arguments=json.dumps({"arguments": call.arguments}, ensure_ascii=False))


def plain_tools(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Return the tools with properties that all have a type and a description.

    Only what the prompt shows changes; calls are checked with the schemas that were sent.
    """
    return tuple(replace(tool, parameters=_plain_object(tool.parameters)) for tool in tools)


def _plain_object(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    properties = schema.get("properties")
    listed = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    return {
        **schema,
        "type": "object",
        "properties": {name: _plain_property(body) for name, body in listed.items()},
        "required": required if isinstance(required, list) else [],
    }


def _plain_property(body: JsonValue) -> JsonValue:
    schema = body if isinstance(body, dict) else {}
    kind = schema.get("type")
    if isinstance(kind, list):
        # A template prints or compares one name; null is the less telling one.
        kind = next((each for each in kind if each != "null"), None)
    description = schema.get("description")
    plain: dict[str, JsonValue] = {
        **schema,
        "type": kind if isinstance(kind, str) else "any",
        "description": description if isinstance(description, str) else "",
    }
    if isinstance(schema.get("properties"), dict) or kind == "object":
        plain = {**_plain_object(plain), "description": plain["description"]}
    if "items" in schema or kind == "array":
        plain["items"] = _plain_property(schema.get("items"))
    return plain
