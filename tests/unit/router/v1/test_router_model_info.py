"""`/v1/models` for Anthropic's clients: its fields, pages and errors."""

from collections.abc import AsyncGenerator
from typing import Any

import anthropic
import pytest
from anthropic.types import ModelInfo

from core.types import Capability
from router.app import create_app
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, make_services, make_view
from tests.live_server import client_of, serving

HEADERS = {"anthropic-version": "2023-06-01"}
THINKER = make_view(
    "thinker@gguf-f16", capabilities=frozenset({Capability.CHAT, Capability.REASONING})
)
VIEWS = (
    make_view(),
    make_view(EMBEDDING_MODEL, capabilities=frozenset({Capability.EMBEDDING})),
    make_view("bad@gguf-q4", state="refused", reason="damaged header"),
    THINKER,
    *(make_view(f"m{number}@gguf-f16") for number in range(5)),
)
LISTED = [CHAT_MODEL, THINKER.id, *(f"m{number}@gguf-f16" for number in range(5))]


@pytest.fixture
async def client() -> AsyncGenerator[anthropic.AsyncAnthropic, None]:
    async with serving(create_app(make_services(views=VIEWS))) as port:
        url = f"http://127.0.0.1:{port}"
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
            yield client


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
async def test_sdk_pages_through_the_models_that_chat(
    client: anthropic.AsyncAnthropic, limit: int
) -> None:
    assert [model.id async for model in client.models.list(limit=limit)] == LISTED
    assert [model.id async for model in client.models.list()] == LISTED
    before = [model.id async for model in client.models.list(before_id=LISTED[4], limit=limit)]
    assert sorted(before) == sorted(LISTED[:4])


async def test_sdk_reads_every_field_of_a_model(client: anthropic.AsyncAnthropic) -> None:
    for name, thinks in (("tiny", False), (THINKER.id, True)):
        model = await client.models.retrieve(name)
        ModelInfo.model_validate(model.model_dump(), strict=True)
        assert model.display_name == name.partition("@")[0]
        assert (model.max_input_tokens, model.created_at.year) == (2048, 2023)
        assert model.capabilities is not None
        assert model.capabilities.thinking.supported is thinks
        assert model.capabilities.effort.supported is thinks
        assert not model.capabilities.image_input.supported
        assert not model.capabilities.context_management.supported
    listed = {model.id: model async for model in client.models.list()}
    assert listed[THINKER.id].to_dict() == model.to_dict()


async def test_sdk_raises_its_own_errors_for_models(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        await client.models.retrieve("org/nothing")
    with pytest.raises(anthropic.BadRequestError, match="after_id"):
        await client.models.list(after_id="nothing")


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1", "²", "9" * 5000])
async def test_wrong_limit_is_refused(limit: str) -> None:
    async with client_of(create_app(make_services(views=VIEWS))) as http:
        answer = await http.get("/v1/models", params={"limit": limit}, headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert answer.json()["error"]["message"].startswith("limit: ")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("lifecycle=retired", []),
        ("lifecycle[]=active&limit=1", LISTED[:1]),
        (f"before_id={LISTED[3]}&limit=2", LISTED[1:3]),
        (f"after_id={LISTED[-1]}", []),
    ],
)
async def test_page_holds_what_the_query_asks_for(query: str, expected: list[str]) -> None:
    async with client_of(create_app(make_services(views=VIEWS))) as http:
        page: dict[str, Any] = (await http.get(f"/v1/models?{query}", headers=HEADERS)).json()
    assert [model["id"] for model in page["data"]] == expected
    ends = (expected[0], expected[-1]) if expected else (None, None)
    assert (page["first_id"], page["last_id"]) == ends


async def test_other_clients_get_openai_fields_and_errors() -> None:
    async with client_of(create_app(make_services(views=VIEWS))) as http:
        listed = (await http.get("/v1/models")).json()
        missing = (await http.get("/v1/models/org/nothing")).json()
        elsewhere = (await http.get("/v1/responses/x", headers=HEADERS)).json()
    assert listed["object"] == "list"
    assert EMBEDDING_MODEL in [model["id"] for model in listed["data"]]
    assert missing["error"]["code"] == "model_not_found"
    assert elsewhere["error"]["code"] == "not_found"


async def test_codex_finds_a_list_of_its_own_that_leaves_its_settings_alone() -> None:
    async with client_of(create_app(make_services(views=VIEWS))) as client:
        codex = (await client.get("/v1/models", params={"client_version": "0.145.0"})).json()
        plain = (await client.get("/v1/models")).json()
    assert codex == {**plain, "models": []}
    assert "models" not in plain
