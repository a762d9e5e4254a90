"""Searching a hub: filters, orders, pages, and answers that are not what they should be."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from catalog.hub.client import HubClient, JsonAnswer
from catalog.hub.search import HubModel, HubQuery, search
from core.errors import HubAnswerInvalid
from core.types import Capability
from scripts.hub_lib.server import Hub
from tests.gguf_raw import minimal_gguf
from tests.unit.catalog.scan.folders import write_weights

CARD = "---\n{card}\n---\n# Title\n"
TOOLS = "{% if tools %}{{ tools }}{% endif %}"


@pytest.fixture
def publish(hub: Hub, tmp_path: Path) -> Callable[..., None]:
    """Publish a repository with a card and a GGUF or a safetensors file."""

    def made(name: str, card: str, template: str | None = None, **facts: Any) -> None:
        folder = tmp_path / name.replace("/", "--")
        folder.mkdir()
        (folder / "README.md").write_text(CARD.format(card=card))
        if template is None:
            write_weights(folder / "model.safetensors")
        else:
            minimal_gguf(folder / "m.gguf", tokenizer__chat_template=template)
        hub.publish(name, folder, **facts)

    return made


@pytest.fixture
def three(publish: Callable[..., None]) -> None:
    """Three repositories that differ in everything that is searched for."""
    publish(
        "a/chat-gguf",
        "license: mit\npipeline_tag: text-generation\ntags: [conversational]\n"
        "base_model: b/weights",
        TOOLS,
        likes=1,
        downloads=30,
        trending=9,
        date="2026-03-01T00:00:00.000Z",
    )
    publish(
        "b/weights",
        "license: other\nlicense_name: llama3\npipeline_tag: text-generation",
        likes=5,
        downloads=20,
        trending=8,
        gated="manual",
        date="2026-02-01T00:00:00.000Z",
    )
    publish(
        "c/embedder",
        "pipeline_tag: sentence-similarity\ntags: [feature-extraction]",
        likes=3,
        downloads=10,
        trending=7,
        date="2026-01-01T00:00:00.000Z",
    )


def found(client: HubClient, **query: Any) -> list[str]:
    return [model.id for model in search(client, HubQuery(**query)).models]


@pytest.mark.usefixtures("three")
def test_hub_search_filters(client: HubClient) -> None:
    assert found(client) == ["a/chat-gguf", "b/weights", "c/embedder"]
    assert found(client, text="EMBED") == ["c/embedder"]
    assert found(client, author="b") == ["b/weights"]
    assert found(client, format="gguf") == ["a/chat-gguf"]
    assert found(client, format="safetensors") == ["b/weights", "c/embedder"]
    assert found(client, licence="mit") == ["a/chat-gguf"]
    assert found(client, gated=True) == ["b/weights"]
    assert found(client, gated=False) == ["a/chat-gguf", "c/embedder"]
    assert found(client, capability=Capability.EMBEDDING) == ["c/embedder"]
    assert found(client, capability=Capability.TOOLS) == ["a/chat-gguf"]
    assert found(client, capability=Capability.RERANK) == []
    after = datetime(2026, 1, 15, tzinfo=UTC)
    assert found(client, updated_after=after) == ["a/chat-gguf", "b/weights"]
    # A day without a time zone is one in UTC.
    assert found(client, updated_after=datetime(2026, 1, 15)) == ["a/chat-gguf", "b/weights"]
    assert found(client, min_parameters=33) == ["b/weights", "c/embedder"]
    assert found(client, max_parameters=32) == ["a/chat-gguf"]


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("trending", "abc"),
        ("downloads", "abc"),
        ("likes", "bca"),
        ("updated", "abc"),
        ("size", "abc"),
    ],
)
def test_hub_search_sorts(client: HubClient, sort: Any, order: str) -> None:
    assert "".join(name[0] for name in found(client, sort=sort)) == order


@pytest.mark.usefixtures("three")
def test_hub_search_tells_what_the_hub_knows(client: HubClient) -> None:
    first, second, _ = search(client, HubQuery()).models
    assert (first.licence, first.formats, first.context_length) == ("mit", ("gguf",), 2048)
    assert first.capabilities == {Capability.CHAT, Capability.COMPLETION, Capability.TOOLS}
    assert (first.parameters, first.weights_bytes, first.base_models) == (32, 0, ("b/weights",))
    assert first.updated == datetime(2026, 3, 1, tzinfo=UTC)
    assert (second.gated, second.licence) == ("manual", "other")
    assert second.weights_bytes == second.parameters * 4


@pytest.mark.usefixtures("three")
def test_hub_search_goes_on_after_a_page(hub: Hub, client: HubClient) -> None:
    page = search(client, HubQuery(limit=2))
    assert [model.id for model in page.models] == ["a/chat-gguf", "b/weights"]
    rest = search(client, HubQuery(limit=2, cursor=page.cursor))
    assert [model.id for model in rest.models] == ["c/embedder"]
    assert rest.cursor == ""
    # Pages without a wanted model are passed over.
    hub.forget_requests()
    last = search(client, HubQuery(limit=1, capability=None, updated_after=None, gated=None))
    assert len(last.models) == 1
    hub.forget_requests()
    after = datetime(2026, 2, 15, tzinfo=UTC)
    assert found(client, limit=1, sort="likes", updated_after=after) == ["a/chat-gguf"]
    assert len(hub.requests) == 3


def test_hub_search_survives_facts_of_other_types() -> None:
    odd: list[Any] = [
        None, 3, [], {}, {"id": 7}, {"id": "x" * 9000},
        {
            "id": "org/odd", "tags": {"a": 1}, "likes": -1, "downloads": True, "gated": 5,
            "safetensors": {"parameters": {"F32": "many", "??": 1}, "total": 2**70},
            "gguf": [1], "config": "no", "lastModified": "yesterday", "pipeline_tag": None,
            "createdAt": "0001-01-01T00:00:00+23:00",
        },
    ]  # fmt: skip

    class Odd(HubClient):
        def get_json(self, *_: Any, **__: Any) -> JsonAnswer:
            return JsonAnswer(odd)

    models = search(Odd("http://hub.test", ""), HubQuery()).models
    assert [len(model.id) for model in models] == [200, 7]
    assert models[-1] == HubModel(
        "org/odd", "", "", "", "", "auto", False, 0, 0, 0, 0, 0, 0, (), frozenset(), (), None, None
    )
    odd.clear()

    class Wrong(HubClient):
        def get_json(self, *_: Any, **__: Any) -> JsonAnswer:
            return JsonAnswer({})

    with pytest.raises(HubAnswerInvalid):
        search(Wrong("http://hub.test", ""), HubQuery())
