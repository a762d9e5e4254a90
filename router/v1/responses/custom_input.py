"""Custom tools: their free text as a function's one argument, and back from a call's arguments."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import RequestError
from core.types import JsonValue
from router.requests.output_format import MAX_GRAMMAR_CHARACTERS, MAX_REGEX_CHARACTERS
from router.v1.responses import request as responses_api
from router.v1.responses.lark_regex import lark_regex

_ARGUMENT = "input"

_BEGUN = re.compile(r'\s*\{\s*"' + _ARGUMENT + r'"\s*:\s*"')
# A cut answer may end within an escape, which has at most 12 characters.
_MAX_ESCAPE = 12


@dataclass(frozen=True, slots=True)
class CustomParameters:
    """The schema of a custom tool's function; `hint` belongs into the tool's description.

    `is_exact` says whether the schema enforces the tool's grammar.
    """

    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    hint: str = ""
    is_exact: bool = True


def custom_parameters(form: responses_api.CustomFormat | None, param: str) -> CustomParameters:
    """Return the schema of the function that stands for a custom tool.  Raises RequestError."""
    if form is None or form.type == "text":
        return CustomParameters(_schema({"type": "string"}))
    if form.definition is None or form.syntax is None:
        missing = "definition" if form.definition is None else "syntax"
        raise RequestError(f"{param}.{missing}: required", param=f"{param}.{missing}")
    limit = MAX_REGEX_CHARACTERS if form.syntax == "regex" else MAX_GRAMMAR_CHARACTERS
    if len(form.definition) > limit:
        raise RequestError(
            f"{param}.definition: has {len(form.definition):,} characters; at most {limit:,} are "
            "accepted",
            param=f"{param}.definition",
        )
    if form.syntax == "regex":
        return CustomParameters(
            _schema(_matching(form.definition)), f"The input matches the regex {form.definition}"
        )
    hint = f"The input is text of this Lark grammar:\n{form.definition}"
    regex = lark_regex(form.definition, MAX_REGEX_CHARACTERS)
    if regex is None:
        return CustomParameters(_schema({"type": "string"}), hint, is_exact=False)
    return CustomParameters(_schema(_matching(regex)), hint)


def to_arguments(text: str) -> str:
    """Return a custom tool's text as the arguments of its function."""
    return json.dumps({_ARGUMENT: text}, ensure_ascii=False)


def to_custom_input(arguments: str) -> str:
    """Return the text in a function's arguments; what is not such arguments is the text itself."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return _begun_text(arguments)
    if isinstance(parsed, dict):
        texts = [value for value in parsed.values() if isinstance(value, str)]
        if isinstance(own := parsed.get(_ARGUMENT), str):
            return own
        return texts[0] if len(texts) == len(parsed) == 1 else arguments
    return parsed if isinstance(parsed, str) else arguments


def _begun_text(arguments: str) -> str:
    """Return the text of arguments that the end of the answer cut off."""
    begun = _BEGUN.match(arguments)
    if begun is None:
        return arguments
    encoded = arguments[begun.end() :]
    for cut in range(min(_MAX_ESCAPE, len(encoded)) + 1):
        try:
            text = json.loads(f'"{encoded[: len(encoded) - cut]}"', strict=False)
        except ValueError:
            continue
        return str(text).encode("utf-8", "replace").decode()
    return arguments


def _schema(text: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    return {
        "type": "object",
        "properties": {_ARGUMENT: dict(text)},
        "required": [_ARGUMENT],
        "additionalProperties": False,
    }


def _matching(regex: str) -> Mapping[str, JsonValue]:
    return {"type": "string", "pattern": f"^(?:{regex})$"}
