"""Queries of the library give what a plain search through all models gives."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from core.types import Capability
from router.library import FACETS, Facet, Library, LibraryQuery, SortKey
from router.services import LibraryEntry, LibraryView, ModelState, ModelView, SettingsView
from tests.fakes import make_view

CAPABILITIES = [Capability.CHAT, Capability.TOOLS, Capability.EMBEDDING]
STATES: list[ModelState] = ["available", "refused", "unavailable"]
FORMATS = ["gguf", "mlx", "onnx"]
SOURCES = ["impetus", "ollama"]
TAGS = ["work", "code", "fun"]
SORTS: list[SortKey] = ["id", "name", "format", "size", "parameters", "context", "added"]


def make_entry(number: int, chance: random.Random) -> LibraryEntry:
    view = make_view(
        f"model-{number:03d}@{chance.choice(FORMATS)}",
        name=chance.choice(["Llama", "qwen", "Phi"]),
        format=chance.choice(FORMATS),
        source=chance.choice(SOURCES),
        state=chance.choice(STATES),
        size_bytes=chance.randrange(6) * 1000,
        parameters=chance.randrange(3),
        context_length=chance.randrange(3),
        created_at=chance.randrange(5),
        capabilities=frozenset(chance.sample(CAPABILITIES, chance.randrange(4))),
        aliases=("coder",) if chance.random() < 0.2 else (),
    )
    tags = chance.sample(TAGS, chance.randrange(3))
    favourite = chance.choice([None, False, True])
    return LibraryEntry(view, SettingsView(tags=tags or None, favourite=favourite, notes="Übung"))


def values_of(view: ModelView, settings: SettingsView) -> Mapping[Facet, set[str]]:
    return {
        "format": {view.format},
        "capability": set(view.capabilities),
        "state": {view.state},
        "source": {view.source},
        "tag": set(settings.tags or ()),
        "favourite": {"true" if settings.favourite else "false"},
    }


def is_kept(found: Mapping[Facet, set[str]], facet: Facet, wanted: Sequence[str]) -> bool:
    if not wanted:
        return True
    if facet in ("capability", "tag"):
        return set(wanted) <= found[facet]
    return bool(set(wanted) & found[facet])


def random_query(chance: random.Random) -> LibraryQuery:
    choices: dict[Facet, list[str]] = {
        "format": FORMATS, "capability": list(CAPABILITIES), "state": [*STATES, "resident"],
        "source": SOURCES, "tag": [*TAGS, "none"], "favourite": ["true"],
    }  # fmt: skip
    return LibraryQuery(
        wanted={
            facet: chance.sample(values, chance.randrange(min(len(values), 2) + 1))
            for facet, values in choices.items()
            if chance.random() < 0.4
        },
        words=chance.choice([(), (), ("PHI",), ("coder", "qwen"), ("übung",), ("nothing",)]),
        min_bytes=chance.choice([None, None, 2000]),
        max_bytes=chance.choice([None, None, 3000]),
        sort=chance.choice(SORTS),
        is_descending=chance.random() < 0.5,
        limit=chance.choice([None, 1, 7]),
    )


SORT_FIELDS = {
    "id": "id", "name": "name", "format": "format", "size": "size_bytes",
    "parameters": "parameters", "context": "context_length", "added": "created_at",
}  # fmt: skip


def sort_value(view: ModelView, sort: SortKey) -> Any:
    value = getattr(view, SORT_FIELDS[sort])
    return value.lower() if sort == "name" else value


@pytest.mark.parametrize("seed", range(150))
def test_library_answers_as_a_search_through_all_models(seed: int) -> None:
    chance = random.Random(seed)
    entries = [make_entry(number, chance) for number in range(chance.choice([0, 1, 40]))]
    changed = {
        entry.view.id: replace(entry.view, state="resident")
        for entry in entries
        if chance.random() < 0.1
    }
    asked = random_query(chance)
    library = Library()
    page = library.query(LibraryView(entries, changed), asked)

    shown = [(changed.get(entry.view.id, entry.view), entry) for entry in entries]
    facts = [values_of(view, entry.settings) for view, entry in shown]
    low, high = asked.min_bytes or 0, asked.max_bytes or 10**9

    def has_words(entry: LibraryEntry) -> bool:
        view = entry.view
        settings = entry.settings
        parts = [view.id, view.name, view.architecture, view.license, view.source, *view.aliases,
                 *(settings.tags or ()), settings.notes or ""]  # fmt: skip
        return all(any(word.lower() in part.lower() for part in parts) for word in asked.words)

    def matching(without: Facet | None = None, *, sized: bool = True) -> list[int]:
        return [
            n
            for n, (view, entry) in enumerate(shown)
            if has_words(entry)
            and (not sized or low <= view.size_bytes <= high)
            and all(
                is_kept(facts[n], facet, wanted)
                for facet, wanted in asked.wanted.items()
                if facet != without or facet in ("capability", "tag")
            )
        ]

    everything = sorted(
        (shown[n] for n in matching()),
        key=lambda pair: (sort_value(pair[0], asked.sort), pair[0].id),
        reverse=asked.is_descending,
    )
    assert page.total == len(everything)
    for facet in FACETS:
        counts: dict[str, int] = {}
        for n in matching(without=facet):
            for value in facts[n][facet]:
                counts[value] = counts.get(value, 0) + 1
        assert page.facets[facet] == counts, facet
    sizes = [shown[n][0].size_bytes for n in matching(sized=False)]
    assert page.sizes == (min(sizes, default=0), max(sizes, default=0))
    # Page after page gives all of them, each once.
    got = list(page.entries)
    while page.next is not None:
        page = library.query(LibraryView(entries, changed), replace(asked, after=page.next))
        assert 0 < len(page.entries) <= (asked.limit or 0)
        got += page.entries
    assert got == everything


def test_library_pages_go_on_where_models_came_and_went() -> None:
    chance = random.Random(1)
    entries = [make_entry(number, chance) for number in range(10)]
    asked = LibraryQuery(limit=4)
    first = Library().query(LibraryView(entries[1:], {}), asked)
    assert [view.id for view, _ in first.entries] == [entry.view.id for entry in entries[1:5]]
    # The last one of the page is deleted, and one before it has come.
    others = [entry for entry in entries if entry is not entries[4]]
    second = Library().query(LibraryView(others, {}), replace(asked, after=first.next))
    assert [view.id for view, _ in second.entries] == [entry.view.id for entry in entries[5:9]]


def test_library_is_indexed_once_until_the_catalog_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from router import library as module

    made: list[int] = []
    index = module.LibraryIndex

    def count(entries: Sequence[LibraryEntry]) -> Any:
        made.append(len(entries))
        return index(entries)

    library = Library()
    monkeypatch.setattr(module, "LibraryIndex", count)
    entries = [make_entry(number, random.Random(number)) for number in range(3)]
    for number in range(3):
        loaded = replace(entries[number].view, state="resident")
        page = library.query(LibraryView(entries, {loaded.id: loaded}), LibraryQuery())
        assert page.facets["state"]["resident"] == 1
    assert made == [3]
    library.query(LibraryView(list(entries), {}), LibraryQuery())
    assert made == [3, 3]
