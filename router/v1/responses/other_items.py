"""Reads items that no tool here made: calls and results of OpenAI's own tools in a history.

Source: the item types of OpenAI's Python SDK, `types/responses/response_input_item.py`.
"""

import json
from collections.abc import Mapping, Sequence

from core.types import ChatMessage, JsonValue, ToolCall
from router.v1.responses.parts import IMAGE_NOTE

_RESULTS = ("output", "outputs", "results", "tools", "error")
_OUTSIDE = frozenset({"type", "id", "status", "call_id", "created_by", "caller", *_RESULTS})


def other_item_messages(item: Mapping[str, JsonValue], call_id: str) -> list[ChatMessage]:
    """Return an item's calls and results as messages; none for an item without readable text.

    `call_id` is the id of a call that has none of its own, being called and answered in one item.
    """
    kind = str(item.get("type"))
    own_id = item.get("call_id")
    if isinstance(own_id, str) and kind.endswith("output"):
        return [ChatMessage("tool", _result(item), tool_call_id=own_id)]
    if isinstance(own_id, str):
        return [ChatMessage("assistant", "", tool_calls=(_call(kind, own_id, item),))]
    if kind.endswith("_call") and any(item.get(name) for name in _RESULTS):
        call = ChatMessage("assistant", "", tool_calls=(_call(kind, call_id, item),))
        return [call, ChatMessage("tool", _result(item), tool_call_id=call_id)]
    return []


def _call(kind: str, call_id: str, item: Mapping[str, JsonValue]) -> ToolCall:
    name, arguments = item.get("name"), item.get("arguments")
    own_name = name if isinstance(name, str) and name else kind.removesuffix("_call")
    if isinstance(arguments, str):
        return ToolCall(call_id, own_name, arguments)
    sent = arguments if isinstance(arguments, dict) else _payload(item)
    return ToolCall(call_id, own_name, _json(sent))


def _payload(item: Mapping[str, JsonValue]) -> JsonValue:
    """Return what a call says: its `action` alone, or all fields about the call."""
    fields = {name: value for name, value in item.items() if name not in _OUTSIDE}
    action = fields.get("action", fields.get("operation"))
    return action if len(fields) == 1 and isinstance(action, dict) else fields


def _result(item: Mapping[str, JsonValue]) -> str:
    results = [item[name] for name in _RESULTS if item.get(name)]
    return "\n".join(_shown(result) for result in results)


def _shown(result: JsonValue) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, list) and all(_is_text(part) for part in result):
        return "\n".join(str(part["text"]) for part in result if isinstance(part, dict))
    return _json(result)


def _is_text(part: JsonValue) -> bool:
    return isinstance(part, dict) and set(part) == {"type", "text"} and bool(part["text"])


def _json(value: JsonValue) -> str:
    return json.dumps(_without_images(value), ensure_ascii=False)


def _without_images(value: JsonValue) -> JsonValue:
    match value:
        case str() if value.startswith("data:"):
            return IMAGE_NOTE
        case dict():
            return {name: _without_images(inner) for name, inner in value.items()}
        case Sequence() if not isinstance(value, str):
            return [_without_images(inner) for inner in value]
    return value
