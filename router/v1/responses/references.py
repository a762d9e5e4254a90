"""References to stored items, and a request's input as items with ids, for storing them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from core.errors import NotFound, RequestError
from core.types import JsonValue
from core.units import MIB, format_bytes
from router.requests.limits import MAX_MESSAGES, too_many
from router.v1.responses.request import Item, ResponsesRequest
from router.v1.responses.store import ResponseStore, StoredItem

# Of all items that a request refers to, each counted as often as it is named.
MAX_REFERENCED_BYTES = 64 * MIB

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}

# A request to compact the conversation, which is not an item of it.
_TRIGGER = "compaction_trigger"

# Fields that items may leave out where they are sent, and have where they are listed.
# Source: OpenAI's description, the members of `InputItem` and `ItemResource`.
_DONE: dict[str, JsonValue] = {"status": "completed"}
_SEARCHED: dict[str, JsonValue] = {"status": "completed", "execution": "client"}
_LISTED_FIELDS: dict[str, dict[str, JsonValue]] = {
    "computer_call_output": _DONE,
    "shell_call": _DONE,
    "shell_call_output": _DONE,
    "tool_search_call": _SEARCHED,
    "tool_search_output": _SEARCHED,
}


@dataclass(frozen=True, slots=True)
class Input:
    """The items of a request with their places in it, references replaced by what they name.

    `skipped` are references to reasoning that is no longer stored.
    """

    items: Sequence[tuple[str, Item]]
    skipped: tuple[str, ...] = ()

    def stored(self, suffix: str) -> Iterator[StoredItem]:
        """Yield the items as JSON; those without an id get one with `suffix`."""
        for index, (_, item) in enumerate(self.items):
            kind = item.type or "message"
            own_id = item.other_item.get("id") if item.other_item is not None else item.id
            if not isinstance(own_id, str) or not own_id:
                own_id = f"{_PREFIXES.get(kind, 'item')}_{suffix}_in{index}"
            if kind == _TRIGGER:
                continue
            fields = _shown(item) if item.other_item is None else _completed(item.other_item)
            shown = {**fields, "id": own_id, "type": kind}
            yield StoredItem(own_id, to_json(shown, inf_nan_mode="null"))


def resolved_input(body: ResponsesRequest, store: ResponseStore) -> Input:
    """Return the request's input.

    Raises NotFound for a reference to what is not stored, and RequestError if the items named are
    too many or too large.
    """
    if isinstance(body.input, str):
        return Input([("input", Item(role="user", content=body.input))])
    items: list[tuple[str, Item]] = []
    skipped: list[str] = []
    known: dict[str, list[Item]] = {}
    size = 0
    for index, item in enumerate(body.input):
        param = f"input[{index}]"
        if not _is_reference(item):
            items.append((param, item))
            continue
        found = _named(store, item.id or "")
        if not found and (item.id or "").startswith("rs_"):
            skipped.append(param)
            continue
        if not found:
            raise NotFound(
                f"Item with id {(item.id or '')[:100]!r} not found; send the item itself instead "
                "of a reference to it.",
                param=f"{param}.id",
            )
        size += sum(len(stored.body) for stored in found)
        if size > MAX_REFERENCED_BYTES:
            raise RequestError(
                f"{param}: the items referred to take more than "
                f"{format_bytes(MAX_REFERENCED_BYTES)}",
                param=param,
            )
        # Items named several times share their text.
        for stored in found:
            if stored.id not in known:
                known[stored.id] = [Item.model_validate(json.loads(stored.body))]
            items += [(param, one) for one in known[stored.id]]
        if len(items) > MAX_MESSAGES:
            raise too_many("input", len(items), "items with those referred to", MAX_MESSAGES)
    return Input(items, tuple(skipped))


def _is_reference(item: Item) -> bool:
    is_bare = item.type is None and item.role is None and item.content is None
    return item.type == "item_reference" or (is_bare and item.id is not None)


def _named(store: ResponseStore, item_id: str) -> Sequence[StoredItem]:
    """Return the stored item, or all items of the stored answer, with this id."""
    item = store.item(item_id)
    if item is not None:
        return (item,)
    stored = store.get(item_id)
    return stored.outputs if stored is not None else ()


def _completed(other: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the item of another tool with the fields that it has where it is listed."""
    defaults = _LISTED_FIELDS.get(str(other["type"]), {})
    missing = {name: value for name, value in defaults.items() if other.get(name) is None}
    return {**other, **missing}


def _shown(item: Item) -> dict[str, JsonValue]:
    """Return an item's own fields as OpenAI lists them: a status, a text in parts."""
    fields: dict[str, Any] = item.model_dump(exclude_unset=True, exclude_none=True)
    fields.setdefault("status", "completed")
    if isinstance(item.content, str):
        fields["content"] = [{"type": "input_text", "text": item.content}]
    for name in ("content", "output"):
        if isinstance(fields.get(name), list):
            fields[name] = [_listed_part(part) for part in fields[name]]
    if item.role == "assistant":
        fields["content"] = [_output_part(part) for part in fields.get("content", ())]
    else:
        fields.pop("phase", None)
    return fields


def _listed_part(part: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {"detail": "auto", **part} if part["type"] == "input_image" else part


def _output_part(part: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if part["type"] not in ("input_text", "text", "output_text"):
        return part
    return {"annotations": [], "logprobs": [], **part, "type": "output_text"}
