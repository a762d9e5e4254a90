"""Reads and writes JSON values of tool calls: limited depth, finite numbers, valid Unicode."""

import json
import math

from core.text import MAX_JSON_DEPTH, is_nested_deeper, well_formed
from core.types import JsonValue


def parse_json(text: str) -> JsonValue:
    """Return the value of `text`.

    Raises ValueError for invalid JSON, nesting over `MAX_JSON_DEPTH`, and numbers that are not
    finite or have thousands of digits.
    """
    if is_nested_deeper(text):
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    value: JsonValue = json.loads(text, parse_constant=_reject, parse_float=_finite)
    return value


def compact(value: object) -> str:
    """Return `value` as compact JSON; lone surrogates become U+FFFD.

    Raises ValueError for numbers that are not finite or have thousands of digits.
    """
    return well_formed(
        json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    )


def _reject(name: str) -> JsonValue:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number
