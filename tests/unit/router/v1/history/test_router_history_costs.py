"""A hostile request of the Responses API costs no more than its parsing: work is counted."""

import json
from dataclasses import replace
from typing import Any

import pytest

from router.requests.body import parse_request
from router.v1.responses import items, tools
from router.v1.responses.items import ItemReader
from router.v1.responses.request import Item, ResponsesRequest
from router.v1.responses.tools import offer_tools

COUNT = 400


def test_calls_of_one_turn_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 0

    def counted(message: Any, **changes: Any) -> Any:
        nonlocal copied
        copied += len(changes.get("tool_calls", ()))
        return replace(message, **changes)

    monkeypatch.setattr(items, "replace", counted)
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    sent = [Item.model_validate({**call, "call_id": f"c{index}"}) for index in range(COUNT)]
    said = Item.model_validate({"role": "assistant", "content": "So."})
    thought = Item.model_validate(
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    )
    history = [thought, said, *sent, said, sent[0]]
    first, last = ItemReader().messages([("input", item) for item in history])
    assert (first.reasoning, first.content, len(first.tool_calls)) == ("Hm.", "So.", COUNT)
    assert [call.id for call in last.tool_calls] == ["c0"]
    assert copied == COUNT + 1


def test_allowed_tools_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    named = 0
    offered_name = tools.offered_name

    def counted(name: str, namespace: str | None) -> str:
        nonlocal named
        named += 1
        return offered_name(name, namespace)

    monkeypatch.setattr(tools, "offered_name", counted)
    listed = [{"type": "function", "name": f"f{index}"} for index in range(COUNT)]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [*listed[1:], {"type": "x"}]}
    body = {"model": "m", "input": "hi", "tools": listed, "tool_choice": choice}
    request = parse_request(json.dumps(body).encode(), ResponsesRequest)
    offered = offer_tools(request).tools
    assert [tool.name for tool in offered] == [one["name"] for one in listed[1:]]
    assert named <= 3 * COUNT
