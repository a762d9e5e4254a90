"""The list of models by the API: filters, pages, facets, and parameters that are refused."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.types import Capability
from router.app import create_app
from router.services import ModelView, SettingsView
from tests.fakes import make_services, make_view
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

VIEWS: list[ModelView] = [
    make_view("a@gguf-q4", format="gguf", size_bytes=10, source="ollama", state="refused"),
    make_view("b@gguf-q8", format="gguf", size_bytes=20, source="impetus", aliases=("coder",)),
    make_view("c@mlx-4bit", format="mlx", size_bytes=30, source="folder"),
    make_view(
        "d@onnx-int8",
        format="onnx",
        size_bytes=40,
        source="package",
        capabilities=frozenset({Capability.EMBEDDING}),
    ),
]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    management = FakeManagement()
    management.settings["c@mlx-4bit"] = SettingsView(tags=["work"], favourite=True)
    services = replace(make_services(views=VIEWS), management=management)
    catalog: Any = services.catalog
    catalog.settings = management.settings
    async with client_of(create_app(services)) as client:
        yield client


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("", "abcd"),
        ("format=gguf", "ab"),
        ("format=gguf&format=onnx", "abd"),
        ("capability=embedding", "d"),
        ("capability=embedding&capability=chat", ""),
        ("state=refused", "a"),
        ("source=impetus&source=folder", "bc"),
        ("tag=work&favourite=true", "c"),
        ("favourite=false", "abd"),
        ("text=CODER", "b"),
        ("text=gguf+q4", "a"),
        ("min_bytes=20&max_bytes=30", "bc"),
        ("sort=-size", "dcba"),
        ("sort=-size&format=gguf", "ba"),
    ],
)
async def test_list_has_what_is_asked_for(http: httpx.AsyncClient, query: str, ids: str) -> None:
    answer = (await http.get(f"/api/models?{query}")).json()
    assert "".join(model["id"][0] for model in answer["models"]) == ids
    assert (answer["total"], answer["next_cursor"]) == (len(ids), None)


async def test_list_counts_facets_with_the_other_filters(http: httpx.AsyncClient) -> None:
    answer = (await http.get("/api/models?format=gguf&min_bytes=15")).json()
    assert answer["facets"]["format"] == {"gguf": 1, "mlx": 1, "onnx": 1}
    assert answer["facets"]["source"] == {"impetus": 1}
    assert answer["facets"]["favourite"] == {"false": 1}
    assert answer["facets"]["tag"] == {}
    assert (answer["smallest_bytes"], answer["largest_bytes"]) == (10, 20)
    assert answer["models"][0]["source"] == "impetus"


async def test_pages_give_every_model_once(http: httpx.AsyncClient) -> None:
    found: list[str] = []
    cursor = ""
    while True:
        query = {"sort": "-name", "limit": "3", **({"cursor": cursor} if cursor else {})}
        answer = (await http.get("/api/models", params=query)).json()
        found += [model["id"][0] for model in answer["models"]]
        assert answer["total"] == 4
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert found == list("dcba")


@pytest.mark.parametrize(
    "query",
    [
        *("format=", "state=odd", "capability=fly", "favourite=perhaps", "min_bytes=-1"),
        *("max_bytes=x", "sort=secret", "sort=id%20DESC;DROP", "limit=0", "limit=1001"),
        *("cursor=x", "cursor=W10=", "cursor=WyJpZCIsIDEsIDJd", "cursor=%00", "page=2"),
        "cursor=WyItc2l6ZSIsIDEsICJhIl0=",
        "text=" + "x" * 201,
    ],
)
async def test_other_parameters_are_refused_by_name_s7(http: httpx.AsyncClient, query: str) -> None:
    answer = await http.get(f"/api/models?{query}")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == query.partition("=")[0]
