"""Tells what a JSON value has against a schema: the decisive faults, without the values."""

from collections.abc import Iterable, Iterator
from typing import Any

from jsonschema.exceptions import ValidationError


def decisive(errors: Iterable[ValidationError]) -> Iterator[ValidationError]:
    """Yield errors; for a union those of the member that deviates least."""
    for error in errors:
        if not error.context:
            yield error
            continue
        members: dict[Any, list[ValidationError]] = {}
        for inner in error.context:
            members.setdefault(inner.schema_path[0], []).append(inner)
        place = len(error.absolute_path)
        faults = [list(decisive(of)) for of in members.values()]
        yield from min(faults, key=lambda found: (_is_of_another_kind(found, place), len(found)))


def _is_of_another_kind(errors: Iterable[ValidationError], place: int) -> bool:
    """Whether a value, `place` keys deep, lacks the type or the constants that tell a member."""
    return any(
        (one.validator == "type" and len(one.absolute_path) == place)
        or (one.validator in ("const", "enum") and len(one.absolute_path) <= place + 1)
        for one in errors
    )


def told(error: ValidationError) -> str:
    """Return path and fault without the values, which differ from answer to answer."""
    path = "".join("[]" if isinstance(key, int) else f".{key}" for key in error.absolute_path)
    value = type(error.instance).__name__
    match error.validator:
        case "type":
            return f"{path}: {value} is not of type {error.validator_value}"
        case "enum" | "const":
            return f"{path}: {error.instance!r} is not one of {error.validator_value}"
    return f"{path}: {error.message}"
