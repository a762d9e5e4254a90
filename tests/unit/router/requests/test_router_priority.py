"""A request's class, from its header, its service tier or its model."""

from typing import Any

import pytest

from core.settings import Settings
from core.types import Priority
from router.app import create_app
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, FakeDispatcher, make_services, make_view
from tests.live_server import client_of, error_of

CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
HEADER = "x-impetus-priority"


async def asked(
    body: dict[str, Any], headers: dict[str, str], default: Priority = "interactive"
) -> Priority:
    dispatcher = FakeDispatcher()
    view = make_view(priority=default)
    async with client_of(create_app(make_services(dispatcher, views=[view]))) as client:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        answer = await client.post(path, json=body, headers=headers)
    assert answer.status_code == 200
    assert "x-impetus-ignored" not in answer.headers
    return dispatcher.requests[0].priority


@pytest.mark.parametrize(
    ("tier", "header", "priority"),
    [
        (None, None, "interactive"),
        ("flex", None, "batch"),
        ("auto", None, "interactive"),
        ("default", None, "interactive"),
        ("priority", None, "interactive"),
        (None, "batch", "batch"),
        ("flex", "interactive", "interactive"),
        ("auto", "batch", "batch"),
    ],
)
async def test_the_header_goes_before_the_tier(
    tier: str | None, header: str | None, priority: str
) -> None:
    headers = {} if header is None else {HEADER: header}
    fields = {} if tier is None else {"service_tier": tier}
    assert await asked({**CHAT, **fields}, headers) == priority
    assert await asked({"model": CHAT_MODEL, "prompt": "hi", **fields}, headers) == priority


async def test_a_request_that_names_none_has_the_class_of_its_model() -> None:
    assert await asked(CHAT, {}, default="batch") == "batch"
    assert await asked({**CHAT, "service_tier": "auto"}, {}, default="batch") == "interactive"


@pytest.mark.parametrize("value", ["", "high", "Batch", "batch, interactive"])
async def test_another_header_is_refused_by_its_name(value: str) -> None:
    async with client_of(create_app(make_services())) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={HEADER: value})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == HEADER


async def test_another_tier_is_ignored_and_named() -> None:
    async with client_of(create_app(make_services())) as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "service_tier": "gold"})
    assert answer.status_code == 200
    assert answer.headers["x-impetus-ignored"] == "service_tier"


async def test_embeddings_have_a_class_too() -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        answer = await client.post(
            "/v1/embeddings",
            json={"model": EMBEDDING_MODEL, "input": "hi"},
            headers={HEADER: "batch"},
        )
    assert answer.status_code == 200
    assert dispatcher.priorities == ["batch"]
    assert dispatcher.deadlines == [Settings().request_timeout_s]
