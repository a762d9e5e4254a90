"""Rejects or removes parts of JSON schemas that a grammar cannot enforce."""

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

from backends.grammar.cost import divisor_of
from core.errors import RequestError, UnsupportedParameter
from core.types import JsonValue

# Compile time grows with the square of their number: 500 take half a second.
_MAX_OPTIONAL = 500
# llguidance builds one state for each remainder; 300,000 take some 4 seconds.
_MAX_STATES = 500_000
# Longest text of a const or enum, in characters.
_MAX_LITERAL = 4096
# Escapes and character classes hold no quantifiers.  A class that is not closed ends with the text:
# looking for its end from every bracket would take quadratic time.
_NO_QUANTIFIER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]?", re.DOTALL)
_DOUBLE_REPEAT = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})[*+]")
# Look-around, word boundaries and back-references; escaped backslashes are removed before.
_LOOKAROUND = re.compile(r"\(\?<?[=!]|\\[1-9bB]|\\k<")


def check_enforceable(schema: JsonValue, param: str) -> None:
    """Raise RequestError for schemas that llguidance compiles too slowly or misinterprets."""
    check_literals(schema, param)
    for item in _objects(schema):
        pattern = item.get("pattern")
        if isinstance(pattern, str):
            check_pattern(pattern, param)
        _check_divisors(item, param)
        _check_properties(item, param)


def check_literals(schema: JsonValue, param: str) -> None:
    """Raise RequestError for a const or enum whose text is too long to be forced."""
    for item in _objects(schema):
        options = item.get("enum")
        for text in [item.get("const"), *(options if isinstance(options, list) else ())]:
            if isinstance(text, str) and len(text) > _MAX_LITERAL:
                raise RequestError(
                    f"The {param} cannot be enforced: a const or enum value has {len(text)} "
                    f"characters, but at most {_MAX_LITERAL} are allowed. Shorten it.",
                    param=param,
                )


def _objects(schema: JsonValue) -> Iterator[Mapping[str, JsonValue]]:
    """Yield every object inside the schema, itself included, whatever its depth."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += item
        elif isinstance(item, dict):
            left += item.values()
            yield item


def _check_divisors(schema: Mapping[str, JsonValue], param: str) -> None:
    divisors = list(_divisors(schema))
    if math.lcm(*map(_remainders, divisors)) > _MAX_STATES:
        shown = " and ".join(f"{divisor:f}"[:40] for divisor in divisors[:3])
        raise UnsupportedParameter(
            f"The {param} cannot be enforced: multipleOf {shown} takes over {_MAX_STATES:,} "
            "states. Leave it out, or use a smaller or rounder number.",
            param=param,
        )


def _divisors(schema: Mapping[str, JsonValue]) -> Iterator[Decimal]:
    """Yield the divisors that one number has to have: the schema's own and those in its allOf."""
    divisor = divisor_of(schema.get("multipleOf"))
    if divisor is not None:
        yield divisor
    members = schema.get("allOf")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict):
            yield from _divisors(member)


def _remainders(divisor: Decimal) -> int:
    """Return the number of remainders that count: powers of 2 and 5 depend on few last digits."""
    remainders = int("".join(map(str, divisor.as_tuple().digits)))
    for factor in (2, 5):
        while remainders and remainders % factor == 0:
            remainders //= factor
    return remainders


def _check_properties(schema: Mapping[str, JsonValue], param: str) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or len(properties) <= _MAX_OPTIONAL:
        return
    needed = {one for one in required if isinstance(one, str)} if isinstance(required, list) else ()
    if len(properties.keys() - needed) > _MAX_OPTIONAL:
        raise RequestError(
            f"The {param} cannot be enforced: an object has more than {_MAX_OPTIONAL} "
            "optional properties. Mark more as required, or send fewer.",
            param=param,
        )


def check_pattern(pattern: str, param: str) -> None:
    """Raise RequestError for a regex with consecutive repetition operators, as in `a**`.

    Rust's syntax accepts them, JSON Schema's does not, so the intended meaning is ambiguous.
    """
    if _DOUBLE_REPEAT.search(_NO_QUANTIFIER.sub("x", pattern)):
        raise RequestError(
            f"The {param} cannot be enforced: the regex {pattern[:100]!r} has consecutive "
            "repetition operators, as in a**. Remove one of them.",
            param=param,
        )


def without_lookaround(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return `schema` without patterns that use look-around or back-references."""
    return {name: _kept(value) for name, value in schema.items() if not _looks_around(name, value)}


def _kept(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return dict(without_lookaround(value))
    return [_kept(item) for item in value] if isinstance(value, list) else value


def _looks_around(name: str, value: JsonValue) -> bool:
    is_pattern = name == "pattern" and isinstance(value, str)
    return is_pattern and _LOOKAROUND.search(str(value).replace("\\\\", "")) is not None
