"""Normalizes chat prompts, to reuse computed prefixes of prompts with the same content.

Changes only what has no meaning for a model:

- Tools are sorted by name; tools with the same name keep their order.
- Keys of a tool's schema are sorted: the common keywords first, then by name.  Properties follow
  the order of `required`, then their names.  Lists and literal values keep their order.
- Billing headers that a client puts before its system prompt are removed: they change with every
  request.

Dates and all other text are unchanged.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from core.types import ChatMessage, ChatPrompt, JsonValue, Tool

_LEADING_KEYS = (
    "$schema", "title", "type", "description", "enum", "const", "properties", "items", "required",
    "additionalProperties",
)  # fmt: skip
_RANKS = {key: rank for rank, key in enumerate(_LEADING_KEYS)}
# Claude Code's first line of the system prompt: its version and a number that always changes.
_BILLING_HEADER = re.compile(r"\A(?:x-[a-z]+-billing-header:[^\n]*\n*)+", re.IGNORECASE)


def normalize_prompt(prompt: ChatPrompt) -> ChatPrompt:
    """Return the prompt with tools and schema keys sorted and billing headers removed."""
    return replace(
        prompt,
        messages=tuple(_without_billing_header(message) for message in prompt.messages),
        tools=tuple(sorted(map(_normalize_tool, prompt.tools), key=lambda tool: tool.name)),
    )


def _normalize_tool(tool: Tool) -> Tool:
    try:
        return replace(tool, parameters=_normalize_schema(tool.parameters))
    except RecursionError:
        # Too deeply nested to sort: unchanged.
        return tool


def _normalize_schema(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a schema with sorted keys."""
    keys = sorted(schema, key=lambda key: (_RANKS.get(key, len(_RANKS)), key))
    return {key: _normalize_value(key, schema) for key in keys}


def _normalize_value(key: str, schema: Mapping[str, JsonValue]) -> JsonValue:
    value = schema[key]
    if key == "properties" and isinstance(value, dict):
        required = schema.get("required")
        listed = required if isinstance(required, list) else []
        first = {name: rank for rank, name in enumerate(listed) if isinstance(name, str)}
        order = sorted(value, key=lambda name: (first.get(name, len(first)), name))
        return {name: _normalize_json(value[name]) for name in order}
    if key in ("default", "const", "enum", "examples"):
        # Literal values, not schemas.
        return value
    return _normalize_json(value)


def _normalize_json(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return _normalize_schema(value)
    if isinstance(value, list):
        return [_normalize_json(each) for each in value]
    return value


def _without_billing_header(message: ChatMessage) -> ChatMessage:
    if message.role != "system":
        return message
    content = _BILLING_HEADER.sub("", message.content)
    return message if content == message.content else replace(message, content=content)
