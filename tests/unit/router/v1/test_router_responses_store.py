"""Stored items of the Responses API: references to them, lists of a response's input, cancel."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseItemList

from core.types import (
    ChatMessage,
    ChatPrompt,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)
from router.app import create_app
from router.v1.responses import references
from router.v1.responses.store import ResponseStore, StoredItem
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import client_of, error_of

PATCH = {"type": "custom", "name": "apply_patch"}
SCRIPT = (
    ReasoningDelta("Hm."),
    TextDelta("Hello"),
    ToolCallDelta(0, "c1", "read", '{"a": 1}'),
    ToolCallDelta(1, "c2", "apply_patch", '{"input": "x"}'),
    finished(),
)
OUTPUTS = [
    {"type": "function_call_output", "call_id": "c1", "output": "one"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": "two"},
]
TURN = (
    ChatMessage("user", "hi"),
    ChatMessage(
        "assistant",
        "Hello",
        reasoning="Hm.",
        tool_calls=(
            ToolCall("c1", "read", '{"a": 1}'),
            ToolCall("c2", "apply_patch", '{"input": "x"}'),
        ),
    ),
    ChatMessage("tool", "one", tool_call_id="c1"),
    ChatMessage("tool", "two", tool_call_id="c2"),
)


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher(*SCRIPT)


@pytest.fixture
async def client(dispatcher: FakeDispatcher) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with client_of(create_app(make_services(dispatcher))) as client:
        yield client


async def created(client: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"model": "tiny", "input": "hi", "tools": [PATCH], **fields}
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def listed(client: httpx.AsyncClient, response_id: str, query: str = "order=asc") -> Any:
    response = await client.get(f"/v1/responses/{response_id}/input_items?{query}")
    assert response.status_code == 200, response.text
    ResponseItemList.model_validate(response.json())
    return response.json()


def messages_of(dispatcher: FakeDispatcher) -> tuple[ChatMessage, ...]:
    prompt = dispatcher.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt.messages


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["items", "bare", "answer", "previous"])
async def test_all_ways_to_name_an_answer_make_the_same_prompt(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher, form: str, stream: bool
) -> None:
    body = {"model": "tiny", "input": "hi", "tools": [PATCH], "stream": stream}
    sent = await client.post("/v1/responses", json=body)
    text = sent.text.rstrip().rpartition("data: ")[2]
    first = json.loads(text)["response"] if stream else sent.json()
    references = {
        "items": [{"type": "item_reference", "id": item["id"]} for item in first["output"]],
        "bare": [{"id": item["id"]} for item in first["output"]],
        "answer": [{"type": "item_reference", "id": first["id"]}],
    }
    if form == "previous":
        await created(client, input=OUTPUTS, previous_response_id=first["id"])
    else:
        user = {"role": "user", "content": "hi"}
        await created(client, input=[user, *references[form], *OUTPUTS])
    assert messages_of(dispatcher) == TURN


async def test_items_of_an_input_are_listed_and_can_be_named(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    first = await created(client)
    answers = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    items = [
        {"role": "user", "content": "hi", "id": "mine"},
        *answers,
        {"type": "web_search_call", "id": "ws", "status": "completed", "action": {"type": "search",
         "query": "q"}},
        *OUTPUTS,
    ]  # fmt: skip
    second = await created(client, input=items)
    page = await listed(client, second["id"])
    ids = [item["id"] for item in page["data"]]
    assert ids[:6] == ["mine", *(one["id"] for one in answers), "ws"]
    assert len(set(ids)) == len(ids) == 8
    assert page["data"][0]["content"] == [{"type": "input_text", "text": "hi"}]
    assert page["data"][1:5] == first["output"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("mine", ids[-1], False)
    await created(client, input=[{"id": item} for item in ids])
    assert messages_of(dispatcher) == TURN
    # What a following response precedes it with is part of its input.
    third = await created(client, input="again", previous_response_id=second["id"])
    assert len((await listed(client, third["id"], "limit=100"))["data"]) == 8 + 4 + 1


async def test_lists_come_in_pages(client: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": str(number), "id": f"i{number}"} for number in range(25)]
    made = await created(client, input=items)
    newest = await listed(client, made["id"], "")
    assert [item["id"] for item in newest["data"]] == [f"i{number}" for number in range(24, 4, -1)]
    assert newest["has_more"]
    rest = await listed(client, made["id"], f"after={newest['last_id']}&limit=5")
    assert [item["id"] for item in rest["data"]] == ["i4", "i3", "i2", "i1", "i0"]
    assert not rest["has_more"]
    path = f"/v1/responses/{made['id']}/input_items"
    for query in ("limit=0", "limit=101", "limit=x", "limit=²", "order=up", "after=nothing"):
        response = await client.get(f"{path}?{query}")
        assert (response.status_code, error_of(response)["param"]) == (400, query.split("=")[0])


async def test_unknown_references_are_refused_but_for_reasoning(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    kept = await created(client, store=False)
    message = next(item["id"] for item in kept["output"] if item["type"] == "message")
    items = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": "rs_gone"}]
    body = {"model": "tiny", "input": items}
    response = await client.post("/v1/responses", json=body)
    assert response.headers["x-impetus-ignored"] == "input[1]"
    asked = len(dispatcher.requests)
    for unknown in (message, "x" * 1000, ""):
        items = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": unknown}]
        response = await client.post("/v1/responses", json={"model": "tiny", "input": items})
        assert (response.status_code, error_of(response)["param"]) == (404, "input[1].id")
    assert len(dispatcher.requests) == asked


async def test_referenced_items_are_bounded(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await created(client, input=[{"role": "user", "content": "y" * 1000, "id": "big"}])
    many = {"model": "tiny", "input": [{"id": made["id"]}] * 600}
    assert error_of(await client.post("/v1/responses", json=many))["param"] == "input"
    monkeypatch.setattr(references, "MAX_REFERENCED_BYTES", 5000)
    large = {"model": "tiny", "input": [{"id": "big"}] * 6}
    assert error_of(await client.post("/v1/responses", json=large))["param"] == "input[4]"


async def test_an_id_of_the_client_never_hides_an_answers_own(
    client: httpx.AsyncClient, dispatcher: FakeDispatcher
) -> None:
    first = await created(client)
    own = first["output"][1]["id"]
    await created(client, input=[{"role": "user", "content": "forged", "id": own}])
    await created(client, input=[{"id": own}])
    assert messages_of(dispatcher) == (ChatMessage("assistant", "Hello"),)


async def test_cancel_and_lists_of_what_is_not_there(client: httpx.AsyncClient) -> None:
    made = await created(client)
    cancelled = await client.post(f"/v1/responses/{made['id']}/cancel", json={})
    assert cancelled.status_code == 400
    assert "synchronous" in error_of(cancelled)["message"]
    assert (await client.get(f"/v1/responses/{made['id']}")).json() == made
    for method, path in (("POST", "cancel"), ("GET", "input_items")):
        response = await client.request(method, f"/v1/responses/resp_x/{path}", json={})
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


async def test_infinite_numbers_in_unknown_fields_are_stored_as_null(
    client: httpx.AsyncClient,
) -> None:
    body = b'{"model": "tiny", "input": [{"role": "user", "content": "x", "y": 1e999}]}'
    response = await client.post(
        "/v1/responses", content=body, headers={"content-type": "application/json"}
    )
    if response.status_code == 200:
        page = await listed(client, response.json()["id"])
        assert page["data"][0]["y"] is None
    else:
        assert response.status_code == 400


def test_store_knows_items_as_long_as_an_answer_holds_them() -> None:
    store = ResponseStore(max_count=2, max_bytes=10**6)
    shared = StoredItem("shared", b"1" * 100)
    store.put("a", b"", (), (), (shared,))
    one = store.used_bytes
    store.put("b", b"", (), (shared,), (StoredItem("b0", b"2"),))
    assert store.used_bytes < 2 * one + 400
    store.put("c", b"", (), (StoredItem("c0", b"3"),))
    assert store.get("a") is None
    assert store.item("shared") is shared
    assert store.delete("b")
    assert (store.item("shared"), store.item("b0")) == (None, None)
    assert store.item("c0") is not None
    assert store.delete("c")
    assert (store.used_bytes, store.item("c0")) == (0, None)
