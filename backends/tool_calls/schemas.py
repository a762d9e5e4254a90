"""What a tool's JSON schema says of its arguments: types for text forms, and whether they fit."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from core.types import JsonValue, Tool

_LITERALS: Mapping[str, JsonValue] = {"True": True, "False": False, "None": None}
_MOST_REFERENCES = 2000
_DEEPEST = 16


def types_of(schema: JsonValue, root: Mapping[str, JsonValue], depth: int = 0) -> frozenset[str]:
    """Return the JSON types that a schema names; none where it does not say."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(one for one in named if isinstance(one, str))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(map(_type_name, values))
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return types_of(_resolved(reference, root), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        if isinstance(choices, list):
            found = [types_of(choice, root, depth + 1) for choice in choices]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()


def _resolved(reference: str, root: Mapping[str, JsonValue]) -> JsonValue:
    found: JsonValue = dict(root)
    for part in reference.removeprefix("#/").split("/"):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def _type_name(value: JsonValue) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def from_text(text: str, types: frozenset[str]) -> JsonValue:
    """Return the value that `text` stands for, where a form writes every value as text.

    Text becomes a number, word, list or object only where `types` allow it, or say nothing;
    what fits none of them stays text.
    """
    if types == {"string"}:
        return text
    stripped = text.strip()
    if stripped in _LITERALS:
        value = _LITERALS[stripped]
    else:
        try:
            value = json.loads(stripped, parse_constant=_refused)
        except (ValueError, RecursionError):
            return text
    if not types:
        return value
    named = _type_name(value)
    if named in types or (named == "integer" and "number" in types):
        return value
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    if "integer" in types and is_whole:
        return int(value)  # type: ignore[arg-type]
    return text


def _refused(name: str) -> JsonValue:
    raise ValueError(name)


def fitting(tools: Sequence[Tool]) -> Callable[[str, str], bool]:
    """Return a check of a call's name and the JSON text of its arguments against its schema.

    Blocks for well under a millisecond once warm.  What cannot be checked fits: patterns, which
    may take for ever, references to elsewhere, and schemas that refer to themselves too often.
    """
    schemas = {tool.name: tool.parameters for tool in tools}
    validators: dict[str, Any] = {}

    def fits(name: str, text: str) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict):
            return False
        if not schemas[name]:
            return True
        if name not in validators:
            validators[name] = _validator(schemas[name])
        return _is_valid(validators[name], value)

    return fits


class _TooMuch(Exception):
    """The schema refers to itself too often to be checked."""


def _is_valid(validator: Any, value: JsonValue) -> bool:
    from jsonschema.exceptions import UndefinedTypeCheck, UnknownType
    from referencing.exceptions import Unresolvable

    validator.format_checker.left = _MOST_REFERENCES
    try:
        return bool(validator.is_valid(value))
    except (_TooMuch, RecursionError, Unresolvable, UnknownType, UndefinedTypeCheck):
        return True
    except (TypeError, ValueError, AttributeError, KeyError):
        # The library trusts a schema's form, and a request's may have any.
        return True


@cache
def _kind() -> Any:
    from jsonschema import Draft202012Validator, validators

    inner = dict(Draft202012Validator.VALIDATORS)
    for name in ("pattern", "patternProperties", "format", "$dynamicRef"):
        inner.pop(name)
    follow = inner["$ref"]

    def reference(validator: Any, target: Any, instance: Any, schema: Any) -> Any:
        validator.format_checker.left -= 1
        if validator.format_checker.left < 0:
            raise _TooMuch
        yield from follow(validator, target, instance, schema) or ()

    inner["$ref"] = reference
    return validators.create(Draft202012Validator.META_SCHEMA, inner)


class _Allowance:
    """How many references one check may still follow; travels where the formats would."""

    left = 0


def _validator(schema: Mapping[str, JsonValue]) -> Any:
    from referencing import Registry

    # An empty registry: nothing is ever fetched.
    return _kind()(dict(schema), registry=Registry(), format_checker=_Allowance())
