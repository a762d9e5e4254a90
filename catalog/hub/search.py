"""Searches a hub for models, with the filters and orders that users ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from catalog.hub import facts
from catalog.hub.client import HubClient
from core.errors import HubAnswerInvalid
from core.types import Capability

Sort: TypeAlias = Literal["trending", "downloads", "likes", "updated", "created", "size"]

MAX_ITEMS = 100
# Pages that are asked for until one has a model that no filter of this server leaves out.
_MAX_PAGES = 5
_SORTS = {
    "trending": "trendingScore",
    "downloads": "downloads",
    "likes": "likes",
    "updated": "lastModified",
    "created": "createdAt",
    # The Hub has no order by size: one page of the most downloaded is ordered here.
    "size": "downloads",
}
_TAGS: Mapping[Capability, str] = {
    Capability.CHAT: "conversational",
    Capability.TOOLS: "conversational",
    Capability.REASONING: "conversational",
    # On models of both tasks, feature-extraction and sentence-similarity.
    Capability.EMBEDDING: "feature-extraction",
}
_TASKS: Mapping[Capability, str] = {
    Capability.COMPLETION: "text-generation",
    Capability.RERANK: "text-ranking",
}
_EXPAND = (
    *("author", "config", "createdAt", "downloads", "gated", "gguf", "lastModified"),
    *("library_name", "likes", "pipeline_tag", "private", "safetensors", "sha", "tags"),
    "trendingScore",
)


@dataclass(frozen=True, slots=True)
class HubQuery:
    """A search; parameters are counted in units, None means no bound.

    `format` is one of this server's, `cursor` that of the last page's `HubPage`.
    """

    text: str = ""
    author: str = ""
    format: str = ""
    capability: Capability | None = None
    licence: str = ""
    gated: bool | None = None
    min_parameters: int | None = None
    max_parameters: int | None = None
    updated_after: datetime | None = None
    sort: Sort = "trending"
    limit: int = 20
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository in the results of a search; 0 and empty strings where the hub says nothing.

    `weights_bytes` are those of safetensors files.
    """

    id: str
    author: str
    sha: str
    task: str
    licence: str
    gated: facts.Gate
    is_private: bool
    likes: int
    downloads: int
    trending: int
    parameters: int
    weights_bytes: int
    context_length: int
    formats: tuple[str, ...]
    capabilities: frozenset[Capability]
    base_models: tuple[str, ...]
    created: datetime | None
    updated: datetime | None


@dataclass(frozen=True, slots=True)
class HubPage:
    """Results of a search; `cursor` continues it, empty at its end."""

    models: tuple[HubModel, ...]
    cursor: str


def search(client: HubClient, query: HubQuery) -> HubPage:
    """Return the next results; blocks.  Raises the errors `Hub…`.

    What the hub cannot filter is left out here, so a page may have fewer than `limit` models, and
    up to five pages are read for one that has any.
    """
    parameters = _parameters(query)
    cursor = query.cursor
    for _ in range(_MAX_PAGES):
        page = {**parameters, "cursor": cursor} if cursor else parameters
        answer = client.get_json("/api/models", "a search", page)
        if not isinstance(answer.value, list):
            raise HubAnswerInvalid(f"{client.host} answered a search with something else.")
        items = map(facts.mapping, answer.value[: _limit(query)])
        models = [model for item in items if _is_wanted(model := describe(item), query)]
        cursor = answer.cursor
        if models or not cursor:
            break
    if query.sort == "size":
        models.sort(key=lambda model: (not model.parameters, model.parameters))
        cursor = ""
    return HubPage(tuple(models), cursor)


def describe(item: Mapping[str, Any]) -> HubModel:
    """Return a model of a search's answer."""
    names = facts.tags(item.get("tags"))
    return HubModel(
        id=facts.text(item.get("id")),
        author=facts.text(item.get("author")),
        sha=facts.text(item.get("sha")),
        task=facts.text(item.get("pipeline_tag")),
        licence=facts.licence(names, facts.mapping(item.get("cardData"))),
        gated=facts.gate(item.get("gated")),
        is_private=item.get("private") is True,
        likes=facts.number(item.get("likes")),
        downloads=facts.number(item.get("downloads")),
        trending=facts.number(item.get("trendingScore")),
        parameters=facts.parameters(item),
        weights_bytes=facts.weights_bytes(item),
        context_length=facts.number(facts.mapping(item.get("gguf")).get("context_length")),
        formats=facts.formats(names),
        capabilities=facts.capabilities(item),
        base_models=facts.base_models(names),
        created=facts.date(item.get("createdAt")),
        updated=facts.date(item.get("lastModified")),
    )


def _limit(query: HubQuery) -> int:
    return MAX_ITEMS if query.sort == "size" else max(1, min(query.limit, MAX_ITEMS))


def _parameters(query: HubQuery) -> dict[str, Any]:
    """Return the hub's parameters for what it can filter itself."""
    tags = [query.format] if query.format else []
    tags += [f"license:{query.licence}"] if query.licence else []
    tags += [_TAGS[query.capability]] if query.capability and query.capability in _TAGS else []
    asked = {
        "search": query.text,
        "author": query.author,
        "filter": tags,
        "pipeline_tag": _TASKS.get(query.capability, "") if query.capability else "",
        "num_parameters": _bounds(query),
    }
    found: dict[str, Any] = {name: value for name, value in asked.items() if value}
    if query.gated is not None:
        found["gated"] = query.gated
    return {**found, "sort": _SORTS[query.sort], "limit": _limit(query), "expand": list(_EXPAND)}


def _bounds(query: HubQuery) -> str:
    """Return the bounds of the parameters in the hub's form, in thousands, rounded outwards."""
    low, high = query.min_parameters, query.max_parameters
    found = [f"min:{low // 1000}K"] if low is not None else []
    return ",".join(found + ([f"max:{-(-high // 1000)}K"] if high is not None else []))


def _is_wanted(model: HubModel, query: HubQuery) -> bool:
    """Whether a model passes the filters that a hub does not have, or may ignore."""
    after = query.updated_after
    if after is not None and after.tzinfo is None:
        after = after.replace(tzinfo=UTC)
    return (
        bool(model.id)
        and (after is None or (model.updated is not None and model.updated >= after))
        and (query.gated is None or bool(model.gated) == query.gated)
        and _has_size(model, query)
        and _can(model, query.capability)
    )


def _has_size(model: HubModel, query: HubQuery) -> bool:
    low, high = query.min_parameters, query.max_parameters
    if low is None and high is None:
        return True
    return bool(model.parameters) and (low or 0) <= model.parameters <= (high or 2**63)


def _can(model: HubModel, capability: Capability | None) -> bool:
    """Whether the facts name the capability, where they can: a template shows tools, thinking."""
    is_shown = capability in (Capability.TOOLS, Capability.REASONING)
    return not is_shown or capability in model.capabilities
