"""Structured outputs: `response_format`, `structured_outputs` and the `guided_` fields."""

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from core.errors import RequestError
from core.types import ChoiceOutput, JsonOutput, Output, RegexOutput
from router.requests.fields import (
    GenerationFields,
    JsonObject,
    RequestPart,
    check_schema,
    unknown_fields,
)

MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 4096
MAX_REGEX_CHARACTERS = 16_384

_Regex: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)]
_Choice: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]
_Choices: TypeAlias = Annotated[list[_Choice], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchema(RequestPart):
    """The schema an answer must match; `name`, `description` and `strict` change nothing here."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    body: JsonObject | None = Field(default=None, alias="schema")


class ResponseFormat(RequestPart):
    """The required format of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def output(self) -> JsonOutput | None:
        """Return the constraint.  Raises RequestError for a schema that is missing or too big."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return JsonOutput(None)
        schema = self.json_schema.body if self.json_schema else None
        param = "response_format.json_schema.schema"
        if schema is None:
            raise RequestError(f"{param}: required for the type json_schema", param=param)
        check_schema(schema, param)
        return JsonOutput(schema)


class StructuredOutputs(RequestPart):
    """vLLM's form: exactly one of a JSON schema, a regex and a list of choices."""

    schema_: JsonObject | str | None = Field(default=None, alias="json")
    regex: _Regex | None = None
    choice: _Choices | None = None


class OutputFields(GenerationFields):
    """The fields that constrain the answer's format; at most one may be used."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: _Regex | None = None
    guided_choice: _Choices | None = None

    def output(self) -> Output | None:
        """Return the constraint.  Raises RequestError for several constraints or a bad schema."""
        structured = self.structured_outputs or StructuredOutputs()
        demands = {
            "structured_outputs.json": structured.schema_,
            "structured_outputs.regex": structured.regex,
            "structured_outputs.choice": structured.choice,
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
        }
        given = [(name, value) for name, value in demands.items() if value is not None]
        own = self.response_format.output() if self.response_format is not None else None
        if len(given) + (own is not None) > 1:
            raise RequestError(
                f"{given[0][0]}: only one of response_format, structured_outputs and the guided_ "
                "fields can constrain an answer; send one",
                param=given[0][0],
            )
        return _output(*given[0]) if given else own

    def ignored_names(self) -> list[str]:
        """Also name the unknown fields of `structured_outputs`."""
        if self.structured_outputs is None:
            return super().ignored_names()
        inner = unknown_fields(self.structured_outputs, "structured_outputs")
        return [*super().ignored_names(), *sorted(inner)]


def _output(name: str, value: Any) -> Output:
    if name.endswith("regex"):
        return RegexOutput(value, name)
    if name.endswith("choice"):
        return ChoiceOutput(tuple(value), name)
    schema = _parsed(value, name) if isinstance(value, str) else value
    check_schema(schema, name)
    return JsonOutput(schema)


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: is not valid JSON", param=name) from error
    if not isinstance(schema, dict):
        raise RequestError(f"{name}: must be a JSON schema, an object", param=name)
    return schema
