"""Uses a tool's JSON schema to convert and validate the arguments of its calls."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from core.types import JsonValue, Tool

_LITERALS: Mapping[str, JsonValue] = {"True": True, "False": False, "None": None}
_MAX_REFERENCES = 2000
_MAX_DEPTH = 16


def types_of(schema: JsonValue, root: Mapping[str, JsonValue], depth: int = 0) -> frozenset[str]:
    """Return the JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
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
    """Convert an argument that a form writes as text into a JSON value.

    Text becomes a number, boolean, null, list or object only if `types` allows it or is empty;
    otherwise it stays text.
    """
    if types == {"string"}:
        return text
    stripped = text.strip()
    if stripped in _LITERALS:
        value = _LITERALS[stripped]
    else:
        try:
            value = json.loads(stripped, parse_constant=_reject_constant)
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


def _reject_constant(name: str) -> JsonValue:
    raise ValueError(name)


def argument_checker(tools: Sequence[Tool]) -> Callable[[str, str], bool]:
    """Return a function that validates a call's arguments (JSON text) against its tool's schema.

    Takes well under a millisecond once warm.  Accepts what it cannot check: patterns, whose time
    is unbounded, references to other documents, and schemas that recurse too deeply.
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


class _TooManyReferences(Exception):
    """The schema recurses too often to be checked."""


def _is_valid(validator: Any, value: JsonValue) -> bool:
    from jsonschema.exceptions import UndefinedTypeCheck, UnknownType
    from referencing.exceptions import Unresolvable

    validator.format_checker.left = _MAX_REFERENCES
    try:
        return bool(validator.is_valid(value))
    except (_TooManyReferences, RecursionError, Unresolvable, UnknownType, UndefinedTypeCheck):
        return True
    except (TypeError, ValueError, AttributeError, KeyError):
        # The library assumes a valid schema, but a request's may be anything.
        return True


@cache
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator, validators

    inner = dict(Draft202012Validator.VALIDATORS)
    for name in ("pattern", "patternProperties", "format", "$dynamicRef"):
        inner.pop(name)
    follow = inner["$ref"]

    def reference(validator: Any, target: Any, instance: Any, schema: Any) -> Any:
        validator.format_checker.left -= 1
        if validator.format_checker.left < 0:
            raise _TooManyReferences
        yield from follow(validator, target, instance, schema) or ()

    inner["$ref"] = reference
    return validators.create(Draft202012Validator.META_SCHEMA, inner)


class _ReferenceBudget:
    """References that one check may still follow; passed in place of a format checker."""

    left = 0


def _validator(schema: Mapping[str, JsonValue]) -> Any:
    from referencing import Registry

    # The empty registry prevents fetching remote schemas.
    return _validator_class()(dict(schema), registry=Registry(), format_checker=_ReferenceBudget())
