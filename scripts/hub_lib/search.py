"""Filters, orders and pages the test hub's repositories as `GET /api/models` does."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from scripts.hub_lib import metadata
from scripts.hub_lib.repositories import Repository

PAGE_ITEMS = 1000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BOUND = re.compile(r"(min|max):(\d+(?:\.\d+)?)([KMBT]?)")
_SORTS: Mapping[str, Callable[[Repository], Any]] = {
    "trendingScore": lambda repository: repository.trending,
    "downloads": lambda repository: repository.downloads,
    "likes": lambda repository: repository.likes,
    "createdAt": lambda repository: repository.created,
    "lastModified": lambda repository: repository.commits[-1].date,
}

Query: TypeAlias = Mapping[str, Sequence[str]]
_Item = TypeVar("_Item")


class BadQuery(Exception):
    """A parameter that the Hub refuses with 400."""


def find(repositories: Sequence[Repository], query: Query) -> list[Repository]:
    """Return the repositories that `query` selects, in its order.  Raises BadQuery."""
    sort = first(query, "sort") or "trendingScore"
    if sort not in _SORTS:
        raise BadQuery(f"Invalid sort: {sort}")
    low, high = _bounds(first(query, "num_parameters"))
    found = [
        each for each in repositories if _is_wanted(each, query) and _is_between(each, low, high)
    ]
    return sorted(found, key=_SORTS[sort], reverse=True)


def page(items: Sequence[_Item], query: Query, size: int) -> tuple[list[_Item], str]:
    """Return the items of the page that `query` asks for, and the cursor of the next, or empty."""
    limit = first(query, "limit")
    if limit and not limit.isdecimal():
        raise BadQuery(f"Invalid limit: {limit}")
    size = max(1, min(int(limit or size), size))
    start = _offset(first(query, "cursor"))
    end = start + size
    cursor = base64.urlsafe_b64encode(f"offset:{end}".encode()).decode()
    return list(items[start:end]), cursor if end < len(items) else ""


def first(query: Query, name: str) -> str:
    """Return the parameter's first value, empty without one."""
    return next(iter(query.get(name, ())), "")


def _offset(cursor: str) -> int:
    try:
        name, _, number = base64.urlsafe_b64decode(cursor).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        name, number = "?", ""
    if cursor and not (name == "offset" and number.isdecimal()):
        raise BadQuery("Invalid cursor")
    return int(number or 0)


def _is_wanted(repository: Repository, query: Query) -> bool:
    commit = repository.commits[-1]
    tags = metadata.tags(repository, commit)
    words = first(query, "search").lower().split()
    author, task = first(query, "author"), first(query, "pipeline_tag")
    gated = first(query, "gated").lower()
    return (
        not repository.is_private
        and all(word in repository.id.lower() for word in words)
        and (not author or repository.author.lower() == author.lower())
        and all(tag in tags for tag in query.get("filter", ()))
        and (not task or metadata.card_data(commit).get("pipeline_tag") == task)
        and (not gated or (gated == "true") == bool(repository.gated))
    )


def _bounds(text: str) -> tuple[float, float]:
    found = {name: float(value) * _UNITS[unit] for name, value, unit in _BOUND.findall(text)}
    if text and not found:
        raise BadQuery(f"Invalid num_parameters: {text}")
    return found.get("min", 0.0), found.get("max", float("inf"))


def _is_between(repository: Repository, low: float, high: float) -> bool:
    if (low, high) == (0.0, float("inf")):
        return True
    count = metadata.parameters(repository.commits[-1])
    return bool(count) and low <= count <= high
