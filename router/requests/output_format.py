"""Structured outputs: `response_format`, and the fields that other servers have for the same."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from core.errors import RequestError
from core.types import ChoiceOutput, GrammarOutput, JsonOutput, Output, RegexOutput
from router.requests.fields import (
    GenerationFields,
    JsonObject,
    RequestPart,
    check_schema,
    refuse_unless_off,
    unknown_fields,
)
from router.requests.other_fields import REFUSED

MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 4096
MAX_REGEX_CHARACTERS = 16_384
MAX_GRAMMAR_CHARACTERS = 65_536

_Regex: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)]
_Grammar: TypeAlias = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARACTERS)]
_Choice: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]
_Choices: TypeAlias = Annotated[list[_Choice], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchema(RequestPart):
    """The schema an answer must match; `name`, `description` and `strict` change nothing here."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    body: JsonObject | None = Field(default=None, alias="schema")


class ResponseFormat(RequestPart):
    """The required format of the answer's text.

    The schema may stand in `json_schema` or, as llama.cpp's server documents it, in `schema`
    itself, also for the type json_object.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    own_schema: JsonObject | None = Field(default=None, alias="schema")

    # Where the API documents the schema, which the error of a missing one names.
    schema_path: ClassVar[str] = "json_schema.schema"

    def output(self, place: str = "response_format") -> JsonOutput | None:
        """Return the constraint of the format, which is the request's field `place`.

        Raises RequestError for a schema that is missing, sent twice or too big.
        """
        nested = self.json_schema.body if self.json_schema else None
        schema, param = self.own_schema, f"{place}.schema"
        if schema is None:
            schema = nested
            param = f"{place}.{self.schema_path if nested is None else 'json_schema.schema'}"
        elif nested is not None:
            raise RequestError(f"{param}: the schema is sent twice; send one", param=param)
        if schema is None:
            if self.type == "json_schema":
                raise RequestError(f"{param}: required for the type json_schema", param=param)
            return JsonOutput(None) if self.type == "json_object" else None
        if self.type == "text":
            raise RequestError(
                f"{param}: the type text has no schema; send the type json_schema", param=param
            )
        check_schema(schema, param)
        return JsonOutput(schema)

    def ignored_names(self, place: str = "response_format") -> set[str]:
        """Return the names of unknown fields."""
        unknown = unknown_fields(self, place)
        if self.json_schema is not None:
            unknown |= unknown_fields(self.json_schema, f"{place}.json_schema")
        return unknown


class FlatFormat(ResponseFormat):
    """The format of the Responses and Messages APIs, which document the schema beside the type."""

    schema_path: ClassVar[str] = "schema"

    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class StructuredOutputs(RequestPart):
    """vLLM's form: exactly one of a JSON schema, any JSON object, a regex, choices, a grammar."""

    schema_: JsonObject | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: _Regex | None = None
    choice: _Choices | None = None
    grammar: _Grammar | None = None


class OutputFields(GenerationFields):
    """The fields that constrain the answer's format; at most one may be used.

    `guided_` fields and `structured_outputs` are vLLM's names, `grammar` and `json_schema`
    llama.cpp's, `json_schema`, `regex` and `ebnf` SGLang's, `format` Ollama's: json or a schema.
    """

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: _Regex | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Grammar | None = None
    grammar: str | JsonObject | None = None
    json_schema: JsonObject | str | None = None
    regex: _Regex | None = None
    ebnf: _Grammar | None = None
    format: JsonObject | str | None = None

    def output(self) -> Output | None:
        """Return the constraint.  Raises RequestError for several constraints or a bad schema."""
        self._refuse_others()
        structured = self.structured_outputs or StructuredOutputs()
        demands = {
            "structured_outputs.json": structured.schema_,
            "structured_outputs.json_object": structured.json_object or None,
            "structured_outputs.regex": structured.regex,
            "structured_outputs.choice": structured.choice,
            "structured_outputs.grammar": structured.grammar or None,
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar or None,
            "grammar": self.grammar or None,
            "json_schema": self.json_schema,
            "regex": self.regex,
            "ebnf": self.ebnf or None,
            "format": None if self.format == "" else self.format,
        }
        given = [(name, value) for name, value in demands.items() if value is not None]
        own = self.response_format.output() if self.response_format is not None else None
        if len(given) + (own is not None) > 1:
            raise RequestError(
                f"{given[0][0]}: only one of response_format, structured_outputs, the guided_ "
                "fields, grammar, json_schema, regex, ebnf and format can constrain an answer; "
                "send one",
                param=given[0][0],
            )
        return _output(*given[0]) if given else own

    def _refuse_others(self) -> None:
        """Raise UnsupportedParameter for what `structured_outputs` holds and is never enforced."""
        inner = self.structured_outputs.model_extra if self.structured_outputs else None
        for name, value in (inner or {}).items():
            if name in REFUSED and value is not None:
                refuse_unless_off(f"structured_outputs.{name}", value, REFUSED[name])

    def ignored_names(self) -> list[str]:
        """Also name the unknown fields of `response_format` and `structured_outputs`."""
        inner: set[str] = set()
        if self.response_format is not None:
            inner |= self.response_format.ignored_names()
        if self.structured_outputs is not None:
            inner |= unknown_fields(self.structured_outputs, "structured_outputs")
        return [*super().ignored_names(), *sorted(inner)]


def _output(name: str, value: Any) -> Output:
    if name == "grammar" and not isinstance(value, str):
        return _typed_output(value, f"{name}.value")
    if name.endswith("regex"):
        return RegexOutput(value, name)
    if name.endswith(("grammar", "ebnf")):
        _check_length(value, MAX_GRAMMAR_CHARACTERS, name)
        return GrammarOutput(value, name)
    if name.endswith("json_object") or (name == "format" and value == "json"):
        return JsonOutput(None)
    if name.endswith("choice"):
        return ChoiceOutput(tuple(value), name)
    if name == "format" and isinstance(value, str) and not value.lstrip().startswith("{"):
        raise RequestError(
            f'format: is {value[:50]!r}; send "json" or a JSON schema, or leave it out',
            param="format",
        )
    schema = _parsed(value, name) if isinstance(value, str) else value
    check_schema(schema, name)
    return JsonOutput(schema)


def _typed_output(grammar: Mapping[str, Any], name: str) -> Output:
    """Read the form of Text Generation Inference, `{"type": …, "value": …}`."""
    match grammar:
        case {"type": "regex", "value": str(pattern)} if pattern:
            _check_length(pattern, MAX_REGEX_CHARACTERS, name)
            return RegexOutput(pattern, name)
        case {"type": "json" | "json_schema", "value": dict() | str() as value}:
            schema = _parsed(value, name) if isinstance(value, str) else value
            check_schema(schema, name)
            return JsonOutput(schema)
    raise RequestError(
        "grammar: must be GBNF or Lark as text, or an object with the type json or regex and a "
        "value; send one of these",
        param="grammar",
    )


def _check_length(text: str, limit: int, name: str) -> None:
    if len(text) > limit:
        raise RequestError(
            f"{name}: has {len(text)} characters; at most {limit} are accepted", param=name
        )


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: is not valid JSON", param=name) from error
    if not isinstance(schema, dict):
        raise RequestError(f"{name}: must be a JSON schema, an object", param=name)
    return schema
