"""Uses a tool's JSON schema to convert and validate the arguments of its calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from backends.tool_calls.json_values import parse_json
from core.errors import is_panic
from core.types import JsonValue, Tool

_LITERALS: Mapping[str, JsonValue] = {"True": True, "False": False, "None": None}
_MAX_SCHEMAS = 200
# About 40 ms for one call, 0.4 s for all calls of an answer: meanwhile no other answer goes on.
_STEPS_OF_CALL, _STEPS_OF_ANSWER = 2_000, 20_000
_STEP_CHARACTERS = 16 * 1024
_MAX_DEPTH = 16


def types_of(schema: JsonValue, root: Mapping[str, JsonValue]) -> frozenset[str]:
    """Return the JSON types that a schema allows; empty if it does not say.

    Schemas that refer to themselves, or to hundreds of others, do not say.
    """
    return _types_of(schema, root, _MAX_DEPTH, iter(range(_MAX_SCHEMAS)))


def _types_of(
    schema: JsonValue, root: Mapping[str, JsonValue], depth: int, budget: Iterator[int]
) -> frozenset[str]:
    if not isinstance(schema, dict) or depth < 0 or next(budget, None) is None:
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
        return _types_of(_resolved(reference, root), root, depth - 1, budget)
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        if isinstance(choices, list):
            return _types_of_any(choices, root, depth - 1, budget)
    return frozenset()


def _types_of_any(
    choices: Sequence[JsonValue], root: Mapping[str, JsonValue], depth: int, budget: Iterator[int]
) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    for choice in choices:
        types = _types_of(choice, root, depth, budget)
        if not types:
            return frozenset()
        found |= types
    return found


def _resolved(reference: str, root: Mapping[str, JsonValue]) -> JsonValue:
    found: object = root
    for part in reference.removeprefix("#/").split("/"):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found if isinstance(found, dict) else None


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
            value = parse_json(stripped)
        except ValueError:
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


def argument_checker(tools: Sequence[Tool]) -> Callable[[str, str], bool]:
    """Return a function that validates a call's arguments (JSON text) against its tool's schema.

    Takes well under a millisecond once warm.  Accepts what it cannot check: patterns, whose time
    is unbounded, references to other documents, invalid schemas, and what would take too long.
    """
    schemas = {tool.name: tool.parameters for tool in tools}
    validators: dict[str, Any] = {}
    left = _STEPS_OF_ANSWER

    def fits(name: str, text: str) -> bool:
        nonlocal left
        try:
            value = parse_json(text)
        except ValueError:
            return False
        if not isinstance(value, dict):
            return False
        if not schemas[name]:
            return True
        # A failing step writes the value into a message that nobody reads.
        cost = 1 + len(text) // _STEP_CHARACTERS
        budget = _StepBudget(min(left, _STEPS_OF_CALL) // cost)
        try:
            if name not in validators:
                validators[name] = _validator(schemas[name])
            validator = validators[name].evolve(format_checker=budget)
            return bool(validator.is_valid(value))
        except BaseException as problem:
            # The library assumes a valid schema, but a request's may be anything.
            if not (isinstance(problem, Exception) or is_panic(problem)):
                raise
            return True
        finally:
            left -= (budget.granted - max(budget.left, 0)) * cost

    return fits


class _TooManySteps(Exception):
    """The check takes too long."""


class _StepBudget:
    """Steps that one check may still take; passed in place of a format checker."""

    def __init__(self, granted: int) -> None:
        self.granted = self.left = granted

    def spend(self, steps: int) -> None:
        """Count steps.  Raises _TooManySteps if none are left."""
        self.left -= steps
        if self.left < 0:
            raise _TooManySteps


def _counted(check: Any, cost: Callable[[Any, Any], int]) -> Any:
    """Return a keyword's check that first spends the `cost` of the keyword's value and the data."""

    def counted(validator: Any, keyword: Any, instance: Any, schema: Any) -> Any:
        validator.format_checker.spend(cost(keyword, instance))
        yield from check(validator, keyword, instance, schema) or ()

    return counted


def _cost(keyword: Any, instance: Any) -> int:
    del keyword, instance
    return 1


def _reference_cost(keyword: Any, instance: Any) -> int:
    del keyword, instance
    return 5


def _unique_cost(keyword: Any, instance: Any) -> int:
    # Items that cannot be sorted are compared each with each.
    return 1 + len(instance) ** 2 // 10 if keyword and isinstance(instance, list) else 1


def _choice_cost(keyword: Any, instance: Any) -> int:
    del instance
    return 1 + len(keyword) // 10 if isinstance(keyword, list) else 1


def _without_patterns(check: Any) -> Any:
    """Return the check of additional properties, skipped where patterns allow more of them."""

    def checked(validator: Any, keyword: Any, instance: Any, schema: Any) -> Any:
        if "patternProperties" not in schema:
            yield from check(validator, keyword, instance, schema) or ()

    return checked


# The time of patterns is unbounded, and unevaluated members are found by patterns too.
_UNCHECKED = (
    "pattern",
    "patternProperties",
    "format",
    "$dynamicRef",
    "unevaluatedProperties",
    "unevaluatedItems",
)
_COSTS = {"$ref": _reference_cost, "uniqueItems": _unique_cost, "enum": _choice_cost}


@cache
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator, validators

    inner = dict(Draft202012Validator.VALIDATORS)
    for name in _UNCHECKED:
        inner.pop(name)
    inner["additionalProperties"] = _without_patterns(inner["additionalProperties"])
    counted = {name: _counted(check, _COSTS.get(name, _cost)) for name, check in inner.items()}
    return validators.create(Draft202012Validator.META_SCHEMA, counted)


def _validator(schema: Mapping[str, JsonValue]) -> Any:
    from referencing import Registry

    # The empty registry prevents fetching remote schemas.
    return _validator_class()(dict(schema), registry=Registry())
