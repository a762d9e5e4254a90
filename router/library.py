"""The library of models: filters, text search, sorting, pages and counts of facets.

Each value of a facet has a bit mask over all models, so a query costs some operations on integers
of as many bits as there are models, whatever it asks for.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from router.services import LibraryEntry, LibraryView, ModelView

Facet: TypeAlias = Literal["format", "capability", "state", "source", "tag", "favourite"]
SortKey: TypeAlias = Literal["id", "name", "format", "size", "parameters", "context", "added"]
Position: TypeAlias = tuple[str | int, str]

FACETS: tuple[Facet, ...] = ("format", "capability", "state", "source", "tag", "favourite")
# Models have several values of these; a filter asks for all that it names, of others for any.
_MULTIPLE: frozenset[Facet] = frozenset({"capability", "tag"})
_SORTS: Mapping[SortKey, Callable[[ModelView], str | int]] = {
    "id": lambda view: view.id,
    "name": lambda view: view.name.lower(),
    "format": lambda view: view.format,
    "size": lambda view: view.size_bytes,
    "parameters": lambda view: view.parameters,
    "context": lambda view: view.context_length,
    "added": lambda view: view.created_at,
}


@dataclass(frozen=True, slots=True)
class LibraryQuery:
    """What is asked of the library.

    `wanted` has values by facet.  `words` are all to be in a model's id, names, tags or notes.
    Sizes are in bytes, both ends included.  `limit` is the longest page, None for all; `after` is
    the position of the last model of the page before.
    """

    wanted: Mapping[Facet, Sequence[str]] = field(default_factory=dict)
    words: Sequence[str] = ()
    min_bytes: int | None = None
    max_bytes: int | None = None
    sort: SortKey = "id"
    is_descending: bool = False
    limit: int | None = None
    after: Position | None = None


@dataclass(frozen=True, slots=True)
class LibraryPage:
    """A page of models in order; `total` counts those of all pages.

    `next` is the position to go on after, None on the last page.  `facets` count, for each value,
    the models that the query has with that value instead of those of the same facet.  `sizes` are
    the smallest and the largest size of the models that all other filters leave.
    """

    entries: Sequence[tuple[ModelView, LibraryEntry]]
    total: int
    next: Position | None
    facets: Mapping[Facet, Mapping[str, int]]
    sizes: tuple[int, int]


class LibraryIndex:
    """Answers queries about one state of the library; made in about 10 µs a model."""

    def __init__(self, entries: Sequence[LibraryEntry]) -> None:
        self.entries = entries
        self._all = (1 << len(entries)) - 1
        self._places = {entry.view.id: place for place, entry in enumerate(entries)}
        self._masks = {
            facet: _masks((_values(entry, facet) for entry in entries), len(entries))
            for facet in FACETS
        }
        self._orders: dict[SortKey, tuple[Sequence[int], Sequence[Position]]] = {}

    @cached_property
    def _texts(self) -> Sequence[str]:
        """What a search looks into, in lower case."""
        return [_text(entry) for entry in self.entries]

    @cached_property
    def _by_size(self) -> tuple[Sequence[int], Sequence[int]]:
        """Places by size, and the sizes."""
        order, positions = self._order("size")
        return order, [int(position[0]) for position in positions]

    def query(self, asked: LibraryQuery, changed: Mapping[str, ModelView]) -> LibraryPage:
        """Return a page; `changed` are views that differ from the entries in their state."""
        masks = {**self._masks, "state": self._states(changed)}
        chosen = {
            facet: _chosen(masks[facet], values, facet)
            for facet, values in asked.wanted.items()
            if values
        }
        found = self._with_words(asked.words)
        in_size = self._in_size(asked.min_bytes, asked.max_bytes)
        left = found
        for mask in chosen.values():
            left &= mask
        facets: dict[Facet, Mapping[str, int]] = {}
        for facet in FACETS:
            others = found & in_size
            for other, mask in chosen.items():
                # Of several values a model can have, those that are chosen stay chosen.
                if other != facet or facet in _MULTIPLE:
                    others &= mask
            facets[facet] = _counts(masks[facet], others)
        matching = left & in_size
        places, following = self._page(asked, matching)
        return LibraryPage(
            [
                (changed.get(entry.view.id, entry.view), entry)
                for entry in (self.entries[place] for place in places)
            ],
            matching.bit_count(),
            following,
            facets,
            self._sizes(left),
        )

    def _states(self, changed: Mapping[str, ModelView]) -> Mapping[str, int]:
        masks = dict(self._masks["state"])
        for model_id, view in changed.items():
            place = self._places.get(model_id)
            if place is not None:
                known = self.entries[place].view.state
                masks[known] &= ~(1 << place)
                masks[view.state] = masks.get(view.state, 0) | 1 << place
        return masks

    def _with_words(self, words: Sequence[str]) -> int:
        if not words:
            return self._all
        lowered = [word.lower() for word in words]
        return _mask(
            (
                place
                for place, text in enumerate(self._texts)
                if all(word in text for word in lowered)
            ),
            len(self.entries),
        )

    def _in_size(self, least: int | None, most: int | None) -> int:
        if least is None and most is None:
            return self._all
        order, sizes = self._by_size
        first = 0 if least is None else bisect_left(sizes, least)
        end = len(sizes) if most is None else bisect_right(sizes, most)
        return _mask(order[first:end], len(self.entries))

    def _sizes(self, mask: int) -> tuple[int, int]:
        order, sizes = self._by_size
        bits = _bits(mask, len(self.entries))
        least = next((sizes[n] for n, place in enumerate(order) if bits[place] == "1"), 0)
        ends = range(len(order) - 1, -1, -1)
        return least, next((sizes[n] for n in ends if bits[order[n]] == "1"), 0)

    def _order(self, sort: SortKey) -> tuple[Sequence[int], Sequence[Position]]:
        """Return all places in order, ids last, and their positions."""
        known = self._orders.get(sort)
        if known is None:
            key = _SORTS[sort]
            found = sorted(
                (key(entry.view), entry.view.id, place) for place, entry in enumerate(self.entries)
            )
            known = [place for _, _, place in found], [(value, name) for value, name, _ in found]
            self._orders[sort] = known
        return known

    def _page(self, asked: LibraryQuery, mask: int) -> tuple[Sequence[int], Position | None]:
        order, positions = self._order(asked.sort)
        ranks: Iterable[int]
        if asked.is_descending:
            end = len(order) if asked.after is None else bisect_left(positions, asked.after)
            ranks = range(end - 1, -1, -1)
        else:
            first = 0 if asked.after is None else bisect_right(positions, asked.after)
            ranks = range(first, len(order))
        bits = _bits(mask, len(self.entries))
        found: list[int] = []
        last = 0
        for rank in ranks:
            if bits[order[rank]] == "1":
                if len(found) == asked.limit:
                    return found, positions[last]
                found.append(order[rank])
                last = rank
        return found, None


class Library:
    """The library, for queries of several threads; indexed anew when the catalog changes."""

    def __init__(self) -> None:
        self._index = LibraryIndex(())

    def query(self, view: LibraryView, asked: LibraryQuery) -> LibraryPage:
        """Return a page of the library; blocks for a few ms, more after a change."""
        index = self._index
        if index.entries is not view.entries:
            index = self._index = LibraryIndex(view.entries)
        return index.query(asked, view.changed)


def _values(entry: LibraryEntry, facet: Facet) -> Iterable[str]:
    view, settings = entry.view, entry.settings
    values: Mapping[Facet, Iterable[Any]] = {
        "format": (view.format,),
        "capability": view.capabilities,
        "state": (view.state,),
        "source": (view.source,),
        "tag": settings.tags or (),
        "favourite": ("true" if settings.favourite else "false",),
    }
    return values[facet]


def _text(entry: LibraryEntry) -> str:
    view, settings = entry.view, entry.settings
    parts = (
        view.id, view.name, view.architecture, view.license, view.source, *view.aliases,
        *(settings.tags or ()), settings.notes or "",
    )  # fmt: skip
    return "\n".join(parts).lower()


def _masks(values: Iterable[Iterable[str]], count: int) -> dict[str, int]:
    places: dict[str, list[int]] = {}
    for place, each in enumerate(values):
        for value in each:
            places.setdefault(value, []).append(place)
    return {value: _mask(found, count) for value, found in places.items()}


def _mask(places: Iterable[int], count: int) -> int:
    """Return an integer with the bits at `places` set, in linear time."""
    packed = bytearray(count // 8 + 1)
    for place in places:
        packed[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(packed, "little")


def _bits(mask: int, count: int) -> str:
    """Return a text with the lowest bit first."""
    return f"{mask:0{count}b}"[::-1] if count else ""


def _chosen(masks: Mapping[str, int], values: Sequence[str], facet: Facet) -> int:
    found = [masks.get(value, 0) for value in values]
    mask = found[0]
    for other in found[1:]:
        mask = mask & other if facet in _MULTIPLE else mask | other
    return mask


def _counts(masks: Mapping[str, int], others: int) -> dict[str, int]:
    counted = ((value, (mask & others).bit_count()) for value, mask in masks.items())
    return {value: count for value, count in sorted(counted) if count}
