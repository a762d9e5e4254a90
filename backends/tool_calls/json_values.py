"""Reads and writes JSON values of tool calls: limited depth, finite numbers, valid Unicode."""

import json
import math
import re

from core.text import well_formed
from core.types import JsonValue

# Python's own limit would depend on how deep its caller is.
MAX_DEPTH = 200
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str) -> JsonValue:
    """Return the value of `text`.

    Raises ValueError for invalid JSON, nesting over `MAX_DEPTH`, and numbers that are not finite or
    have thousands of digits.
    """
    if _is_deeper(text, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    value: JsonValue = json.loads(text, parse_constant=_reject, parse_float=_finite)
    return value


def compact(value: object) -> str:
    """Return `value` as compact JSON; lone surrogates become U+FFFD.

    Raises ValueError for numbers that are not finite or have thousands of digits.
    """
    return well_formed(
        json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    )


def _is_deeper(text: str, limit: int) -> bool:
    if text.count("[") + text.count("{") <= limit:
        return False
    depth = 0
    for found in _STRUCTURE.finditer(text):
        first = text[found.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > limit:
            return True
    return False


def _reject(name: str) -> JsonValue:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number
