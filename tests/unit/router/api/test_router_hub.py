"""`/api/hub`: what is asked of the hub, the limits of a query, and who may ask."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from core.errors import HubOffline, ImpetusError, RequestError
from core.types import Capability
from router.app import create_app
from router.hub_service import (
    FitAnswer,
    HubChoiceAnswer,
    HubEntryAnswer,
    HubReadme,
    HubReferenceAnswer,
    HubRepositoryAnswer,
    HubResult,
    HubResults,
    HubSafetyAnswer,
    HubSearch,
    HubTokenAnswer,
)
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

FIT = FitAnswer(
    verdict="fits",
    reason="It fits.",
    weights_bytes=1,
    kv_bytes=1,
    overhead_bytes=1,
    total_bytes=3,
    free_bytes=9,
    budget_bytes=9,
    context_length=16,
    largest_context=32,
)
MODEL: dict[str, Any] = {
    "id": "org/tiny",
    "author": "org",
    "task": "text-generation",
    "licence": "mit",
    "gated": "",
    "is_private": False,
    "likes": 1,
    "downloads": 2,
    "trending": 3,
    "parameters": 4,
    "formats": ("gguf",),
    "capabilities": (Capability.CHAT,),
    "base_models": (),
    "created": datetime(2026, 1, 1, tzinfo=UTC),
    "updated": None,
}
ENTRY = HubEntryAnswer(
    name="a.gguf",
    format="gguf",
    quantization="q8_0",
    size_bytes=1,
    files=("a.gguf",),
    pickles=(),
    missing=0,
    context_length=32,
    is_refused=False,
    problem="",
    is_downloaded=False,
    fit=FIT,
)
REPOSITORY = HubRepositoryAnswer(
    **MODEL,
    commit="c" * 40,
    has_readme=True,
    safety=HubSafetyAnswer(pickles=(), remote_code=(), findings=(), is_scanned=True),
    entries=(ENTRY,),
    choice=HubChoiceAnswer(entry="a.gguf", reason="It is the only one.", convert_to=""),
)
REFERENCE = HubReferenceAnswer(
    kind="repository",
    repository="org/tiny",
    revision="main",
    file="",
    quantization="Q4_K_M",
    url="",
)
PATHS = ("/api/hub/search", "/api/hub/models/org/tiny", "/api/hub/models/org/tiny/readme")


class FakeHub:
    """Answers with one model, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.problem: ImpetusError | None = None

    async def search(self, search: HubSearch) -> HubResults:
        self._note(search)
        return HubResults(models=(HubResult(**MODEL, fit=FIT),), cursor="next")

    async def repository(
        self, name: str, revision: str, context_tokens: int
    ) -> HubRepositoryAnswer:
        self._note((name, revision, context_tokens))
        return REPOSITORY

    async def readme(self, name: str, revision: str) -> HubReadme:
        self._note((name, revision))
        return HubReadme(markdown="# Tiny")

    async def resolve(self, text: str) -> HubReferenceAnswer:
        self._note(("resolve", text))
        return REFERENCE

    async def token(self) -> HubTokenAnswer:
        self._note("token")
        return HubTokenAnswer(source="login")

    async def store_token(self, token: str) -> HubTokenAnswer:
        self._note(("store", token))
        return HubTokenAnswer(source="stored", owner="jane")

    async def remove_token(self) -> HubTokenAnswer:
        self._note("remove")
        return HubTokenAnswer(source="")

    def _note(self, asked: Any) -> None:
        self.calls.append(asked)
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def ask(hub: FakeHub) -> Ask:
    async def send(path: str, key: str = "", method: str = "GET", **options: Any) -> httpx.Response:
        settings: dict[str, Any] = {"api_key": key} if key else {}
        services = replace(make_services(**settings), management=FakeManagement(), hub=hub)
        credential = {} if key else MANAGING
        async with client_of(create_app(services), **credential) as client:
            return await client.request(method, path, **options)

    return send


async def test_search_passes_its_filters_on(ask: Ask, hub: FakeHub) -> None:
    answer = (await ask("/api/hub/search")).json()
    assert (answer["models"][0]["id"], answer["models"][0]["fit"], answer["cursor"]) == (
        "org/tiny",
        FIT.model_dump(),
        "next",
    )
    await ask(
        "/api/hub/search?query=qwen&author=org&format=gguf&capability=tools&licence=mit&gated=false"
        "&min_parameters=5&max_parameters=9&updated_after=2026-01-02T00:00:00Z&sort=likes&limit=7"
        "&cursor=abc"
    )
    assert hub.calls == [
        HubSearch(),
        HubSearch(
            text="qwen",
            author="org",
            format="gguf",
            capability=Capability.TOOLS,
            licence="mit",
            gated=False,
            min_parameters=5,
            max_parameters=9,
            updated_after=datetime(2026, 1, 2, tzinfo=UTC),
            sort="likes",
            limit=7,
            cursor="abc",
        ),
    ]


async def test_repository_and_readme_are_shown(ask: Ask, hub: FakeHub) -> None:
    answer = await ask("/api/hub/models/org/tiny?context=4096&revision=v1")
    assert answer.json() == REPOSITORY.model_dump(mode="json")
    await ask("/api/hub/models/org/tiny")
    readme = await ask("/api/hub/models/org/readme/readme")
    assert readme.json() == {"markdown": "# Tiny"}
    assert hub.calls == [
        ("org/tiny", "v1", 4096),
        ("org/tiny", "", 8192),
        ("org/readme", ""),
    ]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("search?limit=0", "limit"),
        ("search?limit=101", "limit"),
        ("search?limit=x", "limit"),
        ("search?sort=best", "sort"),
        ("search?capability=vision", "capability"),
        ("search?min_parameters=-1", "min_parameters"),
        ("search?updated_after=yesterday", "updated_after"),
        (f"search?query={'x' * 201}", "query"),
        ("search?q=x", "q"),
        ("search?query=a&query=b", "query"),
        ("models/org/tiny?context=0", "context"),
        ("models/org/tiny?context=99999999999", "context"),
        (f"models/org/tiny?revision={'x' * 201}", "revision"),
        ("models/org/tiny/readme?context=5", "context"),
    ],
)
async def test_wrong_query_is_refused_by_its_parameter(
    ask: Ask, hub: FakeHub, query: str, param: str
) -> None:
    answer = await ask(f"/api/hub/{query}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert hub.calls == []


async def test_token_is_stored_and_never_shown(ask: Ask, hub: FakeHub) -> None:
    path = "/api/hub/token"
    assert (await ask(path)).json() == {"source": "login", "owner": ""}
    stored = await ask(path, method="POST", json={"token": "hf_canary"})
    assert stored.json() == {"source": "stored", "owner": "jane"}
    assert (await ask(path, method="DELETE")).json() == {"source": "", "owner": ""}
    assert hub.calls == ["token", ("store", "hf_canary"), "remove"]
    for body in ({}, {"token": ""}, {"token": "hf_canary" * 200}, {"token": ["hf_canary"]}):
        refused = await ask(path, method="POST", json=body)
        assert (refused.status_code, error_of(refused)["param"]) == (400, "token")
        assert "canary" not in refused.text
    assert len(hub.calls) == 3


async def test_hub_that_is_not_asked_is_told(ask: Ask, hub: FakeHub) -> None:
    hub.problem = HubOffline("Offline mode is on.")
    for path in PATHS:
        answer = await ask(path)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "hub_offline")


async def test_hub_is_guarded_as_management(ask: Ask, hub: FakeHub) -> None:
    page = {
        "origin": "http://localhost:8000",
        "sec-fetch-site": "same-origin",
        "x-impetus-token": "",
    }
    for path in (*PATHS, "/api/hub/token"):
        assert (await ask(path, headers=page)).status_code == 403
        assert (await ask(path, key="canary-key-1234")).status_code == 401
    assert hub.calls == []


async def test_a_pasted_text_is_resolved(ask: Ask, hub: FakeHub) -> None:
    pasted = "https://huggingface.co/org/tiny?library=gguf"
    answer = await ask(f"/api/hub/resolve?text={quote(pasted)}")
    assert (answer.status_code, answer.json()) == (200, REFERENCE.model_dump())
    assert hub.calls == [("resolve", pasted)]
    hub.problem = RequestError("It names no repository.", param="text")
    refused = await ask("/api/hub/resolve?text=x")
    assert (refused.status_code, error_of(refused)["param"]) == (400, "text")


@pytest.mark.parametrize("query", ["", "?text=", f"?text={'x' * 2049}", "?text=a&text=b", "?x=y"])
async def test_resolving_needs_one_text(ask: Ask, hub: FakeHub, query: str) -> None:
    assert (await ask(f"/api/hub/resolve{query}")).status_code == 400
    assert hub.calls == []
