"""Chat prompts in one form, so that what means the same is the same text and computed once.

Changed is only what a model does not read meaning from:

- The order of tools: by name, those of one name in the order they came.
- The order of keys in a tool's schema: what a reader looks for first, then by name.  Properties
  come as `required` lists them, then by name.  Lists and given values keep their order.
- Billing headers that a client puts before its system prompt, of another value in each request.

Dates and all other text stay as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from core.types import ChatMessage, ChatPrompt, JsonValue, Tool

_FIRST_KEYS = (
    "$schema", "title", "type", "description", "enum", "const", "properties", "items", "required",
    "additionalProperties",
)  # fmt: skip
_RANKS = {key: rank for rank, key in enumerate(_FIRST_KEYS)}
# Claude Code, first line of the system prompt: its version and a number that always changes.
_BILLING = re.compile(r"\A(?:x-[a-z]+-billing-header:[^\n]*\n*)+", re.IGNORECASE)


def stable(prompt: ChatPrompt) -> ChatPrompt:
    """Return the prompt in the form that all its variants share; its tools mean the same."""
    return replace(
        prompt,
        messages=tuple(_without_billing(message) for message in prompt.messages),
        tools=tuple(sorted(map(_stable_tool, prompt.tools), key=lambda tool: tool.name)),
    )


def _stable_tool(tool: Tool) -> Tool:
    try:
        return replace(tool, parameters=_stable_schema(tool.parameters))
    except RecursionError:
        # Nested so deeply that it stays as it is.
        return tool


def _stable_schema(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a schema with its keys in order."""
    keys = sorted(schema, key=lambda key: (_RANKS.get(key, len(_RANKS)), key))
    return {key: _stable_value(key, schema) for key in keys}


def _stable_value(key: str, schema: Mapping[str, JsonValue]) -> JsonValue:
    value = schema[key]
    if key == "properties" and isinstance(value, dict):
        required = schema.get("required")
        listed = required if isinstance(required, list) else []
        first = {name: rank for rank, name in enumerate(listed) if isinstance(name, str)}
        order = sorted(value, key=lambda name: (first.get(name, len(first)), name))
        return {name: _stable_json(value[name]) for name in order}
    if key in ("default", "const", "enum", "examples"):
        # Values, not schemas.
        return value
    return _stable_json(value)


def _stable_json(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return _stable_schema(value)
    if isinstance(value, list):
        return [_stable_json(each) for each in value]
    return value


def _without_billing(message: ChatMessage) -> ChatMessage:
    if message.role != "system":
        return message
    content = _BILLING.sub("", message.content)
    return message if content == message.content else replace(message, content=content)
