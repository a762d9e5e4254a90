"""Reads items that no tool here made: calls and results of OpenAI's own tools in a history.

Source: the item types of OpenAI's Python SDK, `types/responses/response_input_item.py`.
"""

import json
from collections.abc import Mapping

from core.types import ChatMessage, JsonValue, ToolCall
from router.requests.unreadable import UnreadableParts, kind_of_data_url

_RESULTS = ("output", "outputs", "results", "tools", "error")
_OUTSIDE = frozenset({"type", "id", "status", "call_id", "created_by", "caller", *_RESULTS})


class OtherItem:
    """An item that stands at `param` in the request; its images and files become notes."""

    def __init__(
        self, item: Mapping[str, JsonValue], param: str, unreadable: UnreadableParts
    ) -> None:
        self._item = item
        self._param = param
        self._unreadable = unreadable

    def messages(self, call_id: str) -> list[ChatMessage]:
        """Return the item's calls and results; none for an item without readable text.

        `call_id` is the id of a call that has none of its own, being called and answered in one
        item.
        """
        kind = str(self._item.get("type"))
        own_id = self._item.get("call_id")
        if isinstance(own_id, str) and kind.endswith("output"):
            return [self._answered(own_id)]
        if isinstance(own_id, str):
            return [self._calling(kind, own_id)]
        if kind.endswith("_call") and any(self._item.get(name) for name in _RESULTS):
            return [self._calling(kind, call_id), self._answered(call_id)]
        return []

    def _calling(self, kind: str, call_id: str) -> ChatMessage:
        name, arguments = self._item.get("name"), self._item.get("arguments")
        own_name = name if isinstance(name, str) and name else kind.removesuffix("_call")
        if not isinstance(arguments, str):
            sent = arguments if isinstance(arguments, dict) else _payload(self._item)
            arguments = self._json(sent)
        return ChatMessage("assistant", "", tool_calls=(ToolCall(call_id, own_name, arguments),))

    def _answered(self, call_id: str) -> ChatMessage:
        results = [self._item[name] for name in _RESULTS if self._item.get(name)]
        text = "\n".join(self._shown(result) for result in results)
        return ChatMessage("tool", text, tool_call_id=call_id)

    def _shown(self, result: JsonValue) -> str:
        if isinstance(result, str):
            return result
        if isinstance(result, list) and all(_is_text(part) for part in result):
            return "\n".join(str(part["text"]) for part in result if isinstance(part, dict))
        return self._json(result)

    def _json(self, value: JsonValue) -> str:
        return json.dumps(self._without_data(value), ensure_ascii=False)

    def _without_data(self, value: JsonValue) -> JsonValue:
        match value:
            case str() if kind := kind_of_data_url(value):
                return self._unreadable.note(kind, self._param, is_asked=False)
            case dict():
                return {name: self._without_data(inner) for name, inner in value.items()}
            case list():
                return [self._without_data(inner) for inner in value]
        return value


def _payload(item: Mapping[str, JsonValue]) -> JsonValue:
    """Return what a call says: its `action` alone, or all fields about the call."""
    fields = {name: value for name, value in item.items() if name not in _OUTSIDE}
    action = fields.get("action", fields.get("operation"))
    return action if len(fields) == 1 and isinstance(action, dict) else fields


def _is_text(part: JsonValue) -> bool:
    return isinstance(part, dict) and set(part) == {"type", "text"} and bool(part["text"])
