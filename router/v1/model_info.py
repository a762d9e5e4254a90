"""`GET /v1/models` as Anthropic's clients read it: model information, in pages.

Source: Anthropic's Python SDK, `types/model_info.py` and `types/model_list_params.py`.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import QueryParams

from core.errors import RequestError
from core.text import escaped
from core.types import Capability, JsonValue
from router.services import ModelView

MAX_PAGE = 1000
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
# What Anthropic's service can remove from a long conversation.
_CONTEXT_EDITS = ("clear_thinking_20251015", "clear_tool_uses_20250919", "compact_20260112")


def model_page(views: Sequence[ModelView], query: QueryParams) -> dict[str, Any]:
    """Return the page that `limit`, `after_id` and `before_id` ask for, all models by default.

    Raises RequestError for a limit outside 1 to 1,000 and for an unknown id.
    """
    limit = _limit(query.get("limit"))
    stages = [*query.getlist("lifecycle"), *query.getlist("lifecycle[]")]
    # Every model here is active.
    found = list(views) if not stages or "active" in stages else []
    if before := query.get("before_id"):
        found = found[: _position(found, before, "before_id")]
        has_more = len(found) > limit
        found = found[-limit:]
    else:
        if after := query.get("after_id"):
            found = found[_position(found, after, "after_id") + 1 :]
        has_more = len(found) > limit
        found = found[:limit]
    return {
        "data": [model_info(view) for view in found],
        "has_more": has_more,
        "first_id": found[0].id if found else None,
        "last_id": found[-1].id if found else None,
    }


def model_info(view: ModelView) -> dict[str, Any]:
    """Return a model with the fields of Anthropic's API.

    Prompt and answer share the context, so it bounds both.
    """
    created = datetime.fromtimestamp(view.created_at, UTC)
    return {
        "type": "model",
        "id": view.id,
        "display_name": escaped(view.name),
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "line": None,
        "deprecated_at": None,
        "retires_at": None,
        "max_input_tokens": view.max_model_len,
        "max_tokens": view.max_model_len,
        "capabilities": _capabilities(view),
    }


def _capabilities(view: ModelView) -> dict[str, JsonValue]:
    yes: dict[str, JsonValue] = {"supported": True}
    no: dict[str, JsonValue] = {"supported": False}
    reasons = yes if Capability.REASONING in view.capabilities else no
    chats = yes if Capability.CHAT in view.capabilities else no
    return {
        "batch": no,
        "citations": no,
        "code_execution": no,
        "context_management": {**no, **dict.fromkeys(_CONTEXT_EDITS, no)},
        "effort": {**reasons, **dict.fromkeys(_EFFORTS, reasons)},
        "image_input": no,
        "pdf_input": no,
        "server_tools": {**no, "code_execution": no, "web_search": no},
        "structured_outputs": chats,
        "thinking": {
            **reasons,
            "types": {
                "adaptive": reasons,
                "between_tools": chats,
                "disabled": chats,
                "enabled": reasons,
            },
        },
    }


def _limit(text: str | None) -> int:
    if text is None:
        return MAX_PAGE
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise RequestError(f"limit: {text[:20]!r} must be from 1 to {MAX_PAGE}", param="limit")
    return int(text)


def _position(views: Sequence[ModelView], model_id: str, param: str) -> int:
    for index, view in enumerate(views):
        if view.id == model_id:
            return index
    raise RequestError(f"{param}: there is no model {model_id[:100]!r}", param=param)
