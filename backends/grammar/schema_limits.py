"""What of a JSON schema a grammar can hold: refused before llguidance sees it, or left out."""

import re
from collections.abc import Mapping

from core.errors import RequestError
from core.types import JsonValue

# The time to compile grows with the square of their number: 500 take half a second.
_MOST_OPTIONAL = 500
# Escapes and character classes hold no quantifiers.
_NO_QUANTIFIER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_DOUBLE_REPEAT = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})[*+]")
# Look-around, word borders and references back; escaped backslashes are taken out before.
_LOOKAROUND = re.compile(r"\(\?<?[=!]|\\[1-9bB]|\\k<")


def check_enforceable(schema: JsonValue, param: str) -> None:
    """Raise RequestError for what llguidance would take long for, or take in another sense."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += item
        elif isinstance(item, dict):
            left += item.values()
            pattern = item.get("pattern")
            if isinstance(pattern, str):
                check_pattern(pattern, param)
            _check_properties(item, param)


def _check_properties(schema: Mapping[str, JsonValue], param: str) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or len(properties) <= _MOST_OPTIONAL:
        return
    needed = {one for one in required if isinstance(one, str)} if isinstance(required, list) else ()
    if len(properties.keys() - needed) > _MOST_OPTIONAL:
        raise RequestError(
            f"The {param} cannot be enforced: an object has more than {_MOST_OPTIONAL} "
            "properties that are not required.",
            param=param,
        )


def check_pattern(pattern: str, param: str) -> None:
    """Raise RequestError for a regex with one repetition right after another, as in `a**`.

    Rust's syntax takes it, that of JSON Schema does not, and what is meant cannot be known.
    """
    if _DOUBLE_REPEAT.search(_NO_QUANTIFIER.sub("x", pattern)):
        raise RequestError(
            f"The {param} cannot be enforced: the regex {pattern[:100]!r} repeats a repetition.",
            param=param,
        )


def without_lookaround(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return `schema` without the patterns that no automaton can follow."""
    return {name: _kept(value) for name, value in schema.items() if not _looks_around(name, value)}


def _kept(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return dict(without_lookaround(value))
    return [_kept(item) for item in value] if isinstance(value, list) else value


def _looks_around(name: str, value: JsonValue) -> bool:
    is_pattern = name == "pattern" and isinstance(value, str)
    return is_pattern and _LOOKAROUND.search(str(value).replace("\\\\", "")) is not None
