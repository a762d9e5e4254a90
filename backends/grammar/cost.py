"""Tells from a schema or regex whether its grammar is certainly cheap to compile."""

import math
import re
from decimal import Decimal
from typing import Any

from core.types import JsonValue

_MAX_NODES = 2000
_MAX_DEPTH = 48
_MAX_REFERENCES = 100
_MAX_CHOICES = 256
_MAX_OPTIONAL = 100
_MAX_TEXT = 64 * 1024
_MAX_PATTERN = 512
# llguidance builds about one state for each remainder of a number.
_MAX_REMAINDERS = 10_000
# Of all schemas and regexes of one grammar together.
_MAX_ALL_REMAINDERS = 20_000
_MAX_ALL_REPETITIONS = 20_000
_MAX_REPETITIONS = 1000
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?")


class CostMeter:
    """Adds up what may make one grammar costly.

    Not `is_cheap` says only that nobody knows: alternatives that are combined, chains of
    references, and divisors whose product counts can take minutes, gigabytes, or the stack.
    """

    def __init__(self) -> None:
        self.is_cheap = True
        self._remainders = 0
        self._repetitions = 0

    def add_schema(self, schema: JsonValue) -> None:
        """Add a JSON schema."""
        measure = _Measure()
        self.is_cheap = self.is_cheap and measure.is_cheap(schema)
        self._remainders += measure.remainders if self.is_cheap else 0
        self._add_repetitions(measure.repetitions)

    def add_pattern(self, pattern: str) -> None:
        """Add a regex."""
        repetitions = _repetitions(pattern)
        is_short = len(pattern) <= _MAX_PATTERN and repetitions <= _MAX_REPETITIONS
        self.is_cheap = self.is_cheap and is_short
        self._add_repetitions(repetitions)

    def _add_repetitions(self, repetitions: int) -> None:
        self._repetitions += repetitions
        if self._remainders > _MAX_ALL_REMAINDERS or self._repetitions > _MAX_ALL_REPETITIONS:
            self.is_cheap = False


class _Measure:
    """Sums what makes one schema costly."""

    def __init__(self) -> None:
        self.remainders = 1
        self.repetitions = 0
        self._nodes = 0
        self._references = 0
        self._choices = 0
        self._text = 0
        self._divisors: set[Decimal] = set()

    def is_cheap(self, schema: JsonValue) -> bool:
        level: list[Any] = [schema]
        for _ in range(_MAX_DEPTH):
            below: list[Any] = []
            for item in level:
                self._nodes += 1
                if self._nodes > _MAX_NODES:
                    return False
                if isinstance(item, str):
                    self._text += len(item)
                elif isinstance(item, list):
                    below += item
                elif isinstance(item, dict):
                    below += item.values()
                    if not self._is_cheap_object(item):
                        return False
            if not below:
                self.remainders = self._common_multiple()
                return self.remainders <= _MAX_REMAINDERS and self._text <= _MAX_TEXT
            level = below
        return False

    def _is_cheap_object(self, item: dict[str, Any]) -> bool:
        self._text += sum(map(len, item))
        self._references += "$ref" in item
        for key in ("anyOf", "oneOf"):
            self._choices += len(item[key]) if isinstance(item.get(key), list) else 0
        both, pattern = item.get("allOf"), item.get("pattern")
        divisor = divisor_of(item.get("multipleOf"))
        if divisor is not None:
            self._divisors.add(divisor)
        repetitions = 0
        if isinstance(pattern, str):
            if len(pattern) > _MAX_PATTERN:
                return False
            repetitions = _repetitions(pattern)
            self.repetitions += repetitions
        return (
            self._references <= _MAX_REFERENCES
            and self._choices <= _MAX_CHOICES
            and not (isinstance(both, list) and len(both) > 1)
            and repetitions <= _MAX_REPETITIONS
            and not _size(item.get("patternProperties")) > 1
            and _optional(item) <= _MAX_OPTIONAL
        )

    def _common_multiple(self) -> int:
        """Return the least common multiple of all divisors, in units of their last digit."""
        if not self._divisors:
            return 1
        if any(abs(each.adjusted()) > 20 for each in self._divisors):
            return _MAX_REMAINDERS + 1
        places = max(max(0, -int(each.as_tuple().exponent)) for each in self._divisors)
        return math.lcm(*(int(each.scaleb(places)) for each in self._divisors))


def _repetitions(pattern: str) -> int:
    """Return the sum of the counts in a regex; more than allowed for numbers of many digits."""
    counts = [count for found in _REPEAT.findall(pattern) for count in found if count]
    if any(len(count) > 6 for count in counts):
        return _MAX_ALL_REPETITIONS + 1
    return sum(map(int, counts))


def divisor_of(value: object) -> Decimal | None:
    """Return a number's decimal value as its JSON shows it; None for anything else."""
    if isinstance(value, float) and math.isfinite(value) and value:
        return Decimal(repr(value)).copy_abs()
    if isinstance(value, int) and not isinstance(value, bool) and value:
        return Decimal(value).copy_abs()
    return None


def _size(value: object) -> int:
    return len(value) if isinstance(value, dict) else 0


def _optional(item: dict[str, Any]) -> int:
    required = item.get("required")
    needed = len(required) if isinstance(required, list) else 0
    return _size(item.get("properties")) - needed
