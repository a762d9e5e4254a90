"""Counts what a JSON text holds without parsing it, and finds where its parts begin and end.

A parser holds Python's global lock for as long as it runs, so nothing else in the process can.
NumPy releases the lock, which makes this scan cheap for others, whatever the text holds.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import RequestError
from router.requests.limits import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_NUMBER_CHARACTERS,
    MAX_VALUES,
)

OPEN_ARRAY, OPEN_OBJECT, CLOSE, COMMA, COLON = range(1, 6)
_CHUNK_BYTES = 1 << 19
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_CODES = np.zeros(256, np.uint8)
for _characters, _code in (
    (b"[", OPEN_ARRAY),
    (b"{", OPEN_OBJECT),
    (b"]}", CLOSE),
    (b",", COMMA),
    (b":", COLON),
):
    _CODES[list(_characters)] = _code
_STEPS = np.zeros(6, np.int8)
_STEPS[[OPEN_ARRAY, OPEN_OBJECT]], _STEPS[CLOSE] = 1, -1
_IS_NUMBER = np.zeros(256, bool)
_IS_NUMBER[list(b"0123456789+-.eE")] = True

# Of a number's whole, fractional and exponent digits, the longest run holds two samples.
_SAMPLE_STEP = MAX_NUMBER_CHARACTERS // 8
_DIGIT_SAMPLES = re.compile(rb"[0-9]{2}")


@dataclass(frozen=True, slots=True)
class Marks:
    """The structural characters of a JSON text: those outside of strings.

    `positions` are byte offsets, `codes` say which character it is, `depths` count the containers
    that are open after it.
    """

    positions: NDArray[np.int64]
    codes: NDArray[np.uint8]
    depths: NDArray[np.int64]


def scan(body: bytes) -> Marks:
    """Return the structural characters of `body`, which need not be valid JSON.

    Raises RequestError with the count and the limit as soon as a limit of `limits` is exceeded.
    """
    data = np.frombuffer(body, np.uint8)
    state = _State(checks_numbers=has_long_digits(body))
    for start in range(0, len(data), _CHUNK_BYTES):
        state.add(data[start : start + _CHUNK_BYTES], start)
    return state.marks()


def has_long_digits(body: bytes) -> bool:
    """Return whether a number, or text of digits, may be longer than the limit."""
    return _DIGIT_SAMPLES.search(body[::_SAMPLE_STEP]) is not None


class _State:
    """What one chunk passes on to the next, and what was found so far."""

    def __init__(self, *, checks_numbers: bool) -> None:
        self._checks_numbers = checks_numbers
        self._is_inside = False
        self._backslashes = 0
        self._number_length = 0
        self._depth = 0
        self._counts = np.zeros(6, np.int64)
        self._positions: list[NDArray[np.int64]] = []
        self._codes: list[NDArray[np.uint8]] = []
        self._depths: list[NDArray[np.int64]] = []

    def add(self, chunk: NDArray[np.uint8], start: int) -> None:
        quotes = chunk == _QUOTE
        quotes[self._escaped(chunk)] = False
        inside = np.cumsum(quotes, dtype=np.uint8)
        inside += self._is_inside
        inside &= 1
        outside = inside ^ 1
        self._is_inside = bool(inside[-1])
        if self._checks_numbers:
            self._check_numbers(_IS_NUMBER[chunk] & outside.view(bool))
        codes = _CODES[chunk]
        codes *= outside
        positions = np.flatnonzero(codes)
        codes = codes[positions]
        depths = np.cumsum(_STEPS[codes], dtype=np.int64)
        depths += self._depth
        if len(depths):
            self._depth = int(depths[-1])
            _check("levels of nesting", int(depths.max()), MAX_DEPTH)
        self._counts += np.bincount(codes, minlength=6)
        containers = int(self._counts[OPEN_ARRAY] + self._counts[OPEN_OBJECT])
        _check("fields", int(self._counts[COLON]), MAX_FIELDS)
        _check("objects and arrays", containers, MAX_CONTAINERS)
        _check("values", int(self._counts[COMMA]) + containers, MAX_VALUES)
        self._positions.append(positions + start)
        self._codes.append(codes)
        self._depths.append(depths)

    def _escaped(self, chunk: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the offsets that an odd number of backslashes precedes."""
        carried, self._backslashes = self._backslashes, 0
        offsets = np.flatnonzero(chunk == _BACKSLASH)
        if not len(offsets):
            return np.zeros(carried & 1, np.int64)
        firsts = np.flatnonzero(np.diff(offsets, prepend=-2) != 1)
        lengths = np.diff(firsts, append=len(offsets))
        ends = offsets[firsts] + lengths
        extra: list[int] = []
        if offsets[0] == 0:
            lengths[0] += carried
        elif carried & 1:
            extra = [0]
        if ends[-1] == len(chunk):
            self._backslashes = int(lengths[-1])
            ends, lengths = ends[:-1], lengths[:-1]
        odd: NDArray[np.int64] = ends[lengths & 1 == 1]
        return np.concatenate((np.array(extra, np.int64), odd)) if extra else odd

    def _check_numbers(self, is_number: NDArray[np.bool_]) -> None:
        others = np.flatnonzero(~is_number)
        if not len(others):
            self._number_length += len(is_number)
            longest = self._number_length
        else:
            first = self._number_length + int(others[0])
            longest = max(first, int(np.diff(others).max(initial=1)) - 1)
            self._number_length = len(is_number) - 1 - int(others[-1])
        _check("characters in one number", longest, MAX_NUMBER_CHARACTERS)

    def marks(self) -> Marks:
        if not self._positions:
            return Marks(np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.int64))
        return Marks(
            np.concatenate(self._positions),
            np.concatenate(self._codes),
            np.concatenate(self._depths),
        )


def _check(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(
            f"The body has {count:,} {what} or more; at most {limit:,} are accepted."
        )
