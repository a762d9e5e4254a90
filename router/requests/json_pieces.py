"""Parses large JSON bodies in pieces, so that no piece holds Python's global lock for long."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jiter
import numpy as np
from numpy.typing import NDArray

from core.errors import RequestError
from core.text import escaped
from router.requests.json_scan import (
    CLOSE,
    COLON,
    COMMA,
    OPEN_ARRAY,
    OPEN_OBJECT,
    Marks,
    has_long_digits,
    scan,
)
from router.requests.limits import (
    MAX_ITEM_CONTAINERS,
    MAX_ITEM_FIELDS,
    MAX_ITEM_VALUES,
    MAX_LIST_LENGTHS,
    too_many,
)
from router.requests.surrogates import without_lone_surrogates

# Smaller bodies are parsed whole, and on the event loop.
SMALL_BYTES = 64 * 1024
_SMALL_VALUES = 4096
# About a millisecond of parsing.
_PIECE_BYTES = 256 * 1024
_PIECE_MARKS = 4096


def is_small(body: bytes) -> bool:
    """Return whether parsing and validating `body` takes at most a few milliseconds."""
    return len(body) <= SMALL_BYTES and sum(map(body.count, (b",", b"[", b"{"))) <= _SMALL_VALUES


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly.

    No duplicate keys, NaN, infinity or byte order mark; lone surrogates become U+FFFD.  Raises
    RequestError, also for a body over a limit of `limits`.
    """
    if is_small(body):
        if has_long_digits(body):
            scan(body)
        data = _parse(body)
    else:
        data = _parse_large(body, scan(body))
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    return data


def _parse(text: bytes, where: str = "") -> Any:
    try:
        return _parse_strictly(text)
    except ValueError as error:
        problem = error
    repaired = without_lone_surrogates(text)
    if repaired != text:
        try:
            return _parse_strictly(repaired)
        except ValueError as error:
            problem = error
    reason = str(problem).partition(" at line")[0] + where if where else str(problem)
    raise RequestError(f"The body is not valid JSON: {escaped(reason, 200)}.") from problem


def _parse_strictly(text: bytes) -> Any:
    return jiter.from_json(text, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")


@dataclass(frozen=True, slots=True)
class _Array:
    """An array that is the value of a field of the body: byte offsets within the brackets."""

    start: int
    end: int
    commas: NDArray[np.int64]


def _parse_large(body: bytes, marks: Marks) -> Any:
    """Parse arrays of the outermost object element by element, and the rest without them."""
    arrays = list(_outer_arrays(body, marks))
    nonce = uuid.uuid4().hex
    rest: list[bytes] = []
    position = 0
    skipped = np.zeros(6, np.int64)
    for index, array in enumerate(arrays):
        rest += (body[position : array.start - 1], f'"{nonce}{index}"'.encode())
        position = array.end + 1
        skipped += _counts(marks, array.start, array.end)
    rest.append(body[position:])
    _check_item("The fields outside of messages, input and tools have", _totals(marks) - skipped)
    data = _parse(b"".join(rest))
    if not isinstance(data, dict):
        return data
    try:
        for name, value in data.items():
            if isinstance(value, str) and value.startswith(nonce):
                data[name] = _parse_array(body, marks, arrays[int(value[len(nonce) :])], name)
    except RequestError:
        free(data.values())
        raise
    return data


def free(values: Iterable[object]) -> None:
    """Free the items of lists one by one; all at once would hold Python's global lock for long."""
    for value in values:
        while isinstance(value, list) and value:
            value.pop()


def _outer_arrays(body: bytes, marks: Marks) -> Iterator[_Array]:
    """Yield the arrays that are values of the outermost object, if they are well placed."""
    codes, depths, positions = marks.codes, marks.depths, marks.positions
    if not len(codes) or codes[0] != OPEN_OBJECT:
        return
    opens = np.flatnonzero((codes == OPEN_ARRAY) & (depths == 2))
    closes = np.flatnonzero((codes == CLOSE) & (depths == 1))
    commas = positions[(codes == COMMA) & (depths == 2)]
    for index in opens:
        start = int(positions[index]) + 1
        after = closes[np.searchsorted(closes, index) :][:1]
        is_value = index > 0 and codes[index - 1] == COLON and depths[index - 1] == 1
        if not is_value or not len(after) or body[positions[after[0]]] != ord("]"):
            continue
        end = int(positions[after[0]])
        low, high = np.searchsorted(commas, (start, end))
        yield _Array(start, end, commas[low:high])


def _parse_array(body: bytes, marks: Marks, array: _Array, name: str) -> list[Any]:
    if not len(array.commas):
        _check_item(f"{_shown(name)}[0] has", _counts(marks, array.start, array.end))
        items: list[Any] = _parse(b"[" + body[array.start : array.end] + b"]")
        return items
    starts = np.concatenate(([array.start], array.commas + 1))
    ends = np.concatenate((array.commas, [array.end]))
    firsts = np.searchsorted(marks.positions, starts)
    lasts = np.searchsorted(marks.positions, ends)
    _check_length(body, array, len(starts), name)
    _check_items(marks, firsts, lasts, name)
    pieces = _cuts(starts, ends, firsts, lasts)
    parsed: list[Any] = []
    try:
        for first, last in pieces:
            where = f" in {_shown(name)}[{first}] to [{last - 1}]"
            piece = _parse(b"[" + body[starts[first] : ends[last - 1]] + b"]", where)
            if len(piece) != last - first:
                raise RequestError(
                    f"The body is not valid JSON: {_shown(name)} has an empty element."
                )
            parsed += piece
    except RequestError:
        free((parsed,))
        raise
    return parsed


def _check_length(body: bytes, array: _Array, length: int, name: str) -> None:
    """Refuse a list with too many items before they are parsed; token ids have no such limit."""
    limit = MAX_LIST_LENGTHS.get(name, length)
    first = body[array.start : array.start + 64].lstrip()[:1]
    if length > limit and not first.isdigit():
        raise too_many(name, length, "items", limit)


def _cuts(
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    firsts: NDArray[np.int64],
    lasts: NDArray[np.int64],
) -> Iterator[tuple[int, int]]:
    """Yield the first element of each piece of an array, and the first one behind it."""
    first = 0
    while first < len(starts):
        # As many elements as fit into a piece, at least one.
        by_bytes = np.searchsorted(ends, starts[first] + _PIECE_BYTES, side="right")
        by_marks = np.searchsorted(lasts, firsts[first] + _PIECE_MARKS, side="right")
        last = max(int(min(by_bytes, by_marks)), first + 1)
        yield first, last
        first = last


def _check_items(
    marks: Marks, firsts: NDArray[np.int64], lasts: NDArray[np.int64], name: str
) -> None:
    """Check the elements whose marks alone are more than the smallest limit."""
    for index in np.flatnonzero(lasts - firsts > MAX_ITEM_CONTAINERS):
        codes = marks.codes[firsts[index] : lasts[index]]
        _check_item(f"{_shown(name)}[{index}] has", np.bincount(codes, minlength=6))


def _counts(marks: Marks, start: int, end: int) -> NDArray[np.int64]:
    low, high = np.searchsorted(marks.positions, (start, end))
    return np.bincount(marks.codes[low:high], minlength=6)


def _totals(marks: Marks) -> NDArray[np.int64]:
    return np.bincount(marks.codes, minlength=6)


def _check_item(subject: str, counts: NDArray[np.int64]) -> None:
    containers = int(counts[OPEN_ARRAY] + counts[OPEN_OBJECT])
    for what, count, limit in (
        ("fields", int(counts[COLON]), MAX_ITEM_FIELDS),
        ("objects and arrays", containers, MAX_ITEM_CONTAINERS),
        ("values", int(counts[COMMA]) + containers, MAX_ITEM_VALUES),
    ):
        if count > limit:
            raise RequestError(f"{subject} {count:,} {what}; at most {limit:,} are accepted.")


def _shown(name: str) -> str:
    return escaped(name, 64)
