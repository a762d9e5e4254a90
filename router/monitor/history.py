"""Keeps samples of a day in memory, and summarizes them for charts."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias

SAMPLE_S = 10.0
SPAN_S = 86_400.0
MAX_LINES = 256

SeriesName: TypeAlias = Literal["memory", "tokens", "first_token", "requests", "cpu", "thermal"]

_MISSING = math.nan
# Of more times to the first token in one sample so many are kept, evenly.
_MOST_WAITS = 64
_QUANTILES = {"p50": 0.5, "p95": 0.95}


@dataclass(frozen=True, slots=True, order=True)
class LineName:
    """Which line of a chart: its `label`, and the model that it is about, if any."""

    series: SeriesName
    label: str
    model: str = ""


@dataclass(frozen=True, slots=True)
class ChartLine:
    """Least, mean and greatest value of each time step; None where there is no sample."""

    name: LineName
    least: Sequence[float | None]
    mean: Sequence[float | None]
    most: Sequence[float | None]


@dataclass(slots=True)
class _Line:
    values: "array[float]"
    written: int = 0


@dataclass(slots=True)
class _Step:
    """What is known of one time step of one line."""

    total: float = 0.0
    count: int = 0
    least: float = math.inf
    most: float = -math.inf

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.least = min(self.least, value)
        self.most = max(self.most, value)


class History:
    """A ring of samples; about 35 kB for each line of a chart, and no more than `max_lines`.

    Samples are added from one thread, and may be read from another at the same time.
    """

    def __init__(
        self, *, sample_s: float = SAMPLE_S, span_s: float = SPAN_S, max_lines: int = MAX_LINES
    ) -> None:
        self.sample_s = sample_s
        self._slots = math.ceil(span_s / sample_s)
        self._max_lines = max_lines
        self._times = array("d", [_MISSING]) * self._slots
        self._waits: list[array[float] | None] = [None] * self._slots
        self._lines: dict[LineName, _Line] = {}
        self._count = 0

    def record(
        self, at: float, values: Mapping[LineName, float], first_tokens_s: Iterable[float] = ()
    ) -> None:
        """Add a sample of `at`, in Unix seconds; replaces the oldest one of a full ring.

        `first_tokens_s` are the times to the first token since the last sample, in seconds.
        """
        slot = self._count % self._slots
        self._times[slot] = _MISSING
        for line in self._lines.values():
            line.values[slot] = _MISSING
        for name, value in values.items():
            line = self._line(name)
            line.values[slot] = value
            line.written = self._count
        self._waits[slot] = _kept(first_tokens_s)
        self._times[slot] = at
        self._count += 1

    def _line(self, name: LineName) -> _Line:
        """Return a line; a new one takes the place of the one that got no value for longest."""
        found = self._lines.get(name)
        if found is None:
            if len(self._lines) >= self._max_lines:
                del self._lines[min(self._lines, key=lambda one: self._lines[one].written)]
            found = _Line(array("f", [_MISSING]) * self._slots)
            self._lines[name] = found
        return found

    def lines(self, series: SeriesName, start: float, step_s: float, count: int) -> list[ChartLine]:
        """Return the lines of a chart over `count` steps of `step_s` seconds from `start` on.

        A line without a value in that time is left out.  Takes milliseconds for each line.
        """
        places = [
            (slot, step)
            for slot, at in enumerate(self._times)
            if at >= start and (step := int((at - start) // step_s)) < count
        ]
        if series == "first_token":
            return self._wait_lines(places, count)
        # A copy: lines may be added meanwhile.
        held = {name: line for name, line in list(self._lines.items()) if name.series == series}
        found = (_chart_line(name, held[name].values, places, count) for name in sorted(held))
        return [line for line in found if line is not None]

    def _wait_lines(self, places: Sequence[tuple[int, int]], count: int) -> list[ChartLine]:
        """Return quantiles of each step, and their least and greatest among its samples."""
        steps: dict[int, list[array[float]]] = {}
        for slot, step in places:
            if (waits := self._waits[slot]) is not None:
                steps.setdefault(step, []).append(waits)
        merged = {step: sorted(chain.from_iterable(each)) for step, each in steps.items()}
        found = []
        for label, share in _QUANTILES.items() if steps else ():
            rows: list[tuple[float, float, float] | None] = [None] * count
            for step, samples in steps.items():
                each = [_quantile(waits, share) for waits in samples]
                rows[step] = (min(each), _quantile(merged[step], share), max(each))
            found.append(_of_rows(LineName("first_token", label), rows))
        return found


def _chart_line(
    name: LineName, values: "array[float]", places: Sequence[tuple[int, int]], count: int
) -> ChartLine | None:
    steps: dict[int, _Step] = {}
    for slot, step in places:
        value = values[slot]
        if not math.isnan(value):
            known = steps.get(step)
            if known is None:
                known = steps[step] = _Step()
            known.add(value)
    if not steps:
        return None
    rows: list[tuple[float, float, float] | None] = [None] * count
    for number, step_ in steps.items():
        rows[number] = (step_.least, step_.total / step_.count, step_.most)
    return _of_rows(name, rows)


def _of_rows(name: LineName, rows: Sequence[tuple[float, float, float] | None]) -> ChartLine:
    columns = [[None if row is None else round(row[at], 4) for row in rows] for at in range(3)]
    return ChartLine(name, *columns)


def _kept(values: Iterable[float]) -> "array[float] | None":
    """Return values in order, at most `_MOST_WAITS` of them; None without any."""
    found = sorted(values)
    if len(found) > _MOST_WAITS:
        gap = (len(found) - 1) / (_MOST_WAITS - 1)
        found = [found[round(number * gap)] for number in range(_MOST_WAITS)]
    return array("f", found) if found else None


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share does not exceed."""
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]
