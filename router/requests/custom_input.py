"""Custom tools: their free text as a function's one argument, and back from a call's arguments."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from core.errors import RequestError
from core.types import JsonValue
from router.requests.fields import RequestPart
from router.requests.lark_regex import lark_regex
from router.requests.output_format import MAX_GRAMMAR_CHARACTERS, MAX_REGEX_CHARACTERS

_ARGUMENT = "input"

_BEGUN = re.compile(r'\s*\{\s*"' + _ARGUMENT + r'"\s*:\s*"')
# The start of arguments is not searched for the text any further.
_MAX_HEAD = 1024
# Source: RFC 8259, section 7; a pair of surrogates is one character.
_PIECE = re.compile(
    r'(?P<plain>[^"\\]+)'
    r"|\\u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|\\u(?P<code>[0-9a-fA-F]{4})"
    r'|\\(?P<short>["\\/bfnrt])'
    r"|(?P<other>\\)"
)
# What more characters could make an escape, or a pair of them.
_UNFINISHED = re.compile(
    r"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}"
    r"(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?)?)?\Z"
)
_SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_REPLACEMENT = "\ufffd"


class CustomFormat(RequestPart):
    """The form of a custom tool's text: any, or what a grammar describes."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


@dataclass(frozen=True, slots=True)
class CustomParameters:
    """The schema of a custom tool's function; `hint` belongs into the tool's description.

    `is_exact` says whether the schema enforces the tool's grammar.
    """

    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    hint: str = ""
    is_exact: bool = True


def custom_parameters(form: CustomFormat | None, param: str) -> CustomParameters:
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


class CustomInput:
    """Decodes a custom tool's text while the arguments of its function are written.

    It begins in arguments like `{"input": "…`, as their schema makes the model write them.
    """

    def __init__(self) -> None:
        self._head = ""
        self._held = ""
        self._is_over = False
        self.has_begun = False

    def push(self, piece: str) -> str:
        """Return the text that the next piece of the arguments adds."""
        if self._is_over:
            return ""
        if not self.has_begun:
            if len(self._head) > _MAX_HEAD:
                return ""
            self._head += piece
            begun = _BEGUN.match(self._head)
            if begun is None:
                return ""
            self.has_begun, piece = True, self._head[begun.end() :]
        return self._decoded(self._held + piece)

    def finish(self) -> str:
        """Return the text of an escape that the end of the answer cut off."""
        held, self._held, self._is_over = self._held, "", True
        # Half of a pair; less than a whole escape is no character.
        return _REPLACEMENT if len(held) >= len("\\ud83d") else ""

    def _decoded(self, encoded: str) -> str:
        texts: list[str] = []
        self._held = ""
        at = 0
        while at < len(encoded):
            if _UNFINISHED.match(encoded, at):
                break
            found = _PIECE.match(encoded, at)
            if found is None:
                self._is_over = True
                return "".join(texts)
            texts.append(_character(found))
            at = found.end()
        self._held = encoded[at:]
        return "".join(texts)


def _character(piece: re.Match[str]) -> str:
    """Return what a piece of a JSON string stands for; a wrong escape stands for itself."""
    match piece.lastgroup:
        case "low":
            high, low = int(piece["high"], 16), int(piece["low"], 16)
            return chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00)
        case "code":
            code = int(piece["code"], 16)
            return _REPLACEMENT if 0xD800 <= code < 0xE000 else chr(code)
        case "short":
            return _SHORT.get(piece["short"], piece["short"])
    return piece[0]


def to_custom_input(arguments: str) -> str:
    """Return the text in a function's arguments; what is not such arguments is the text itself.

    It begins with what a `CustomInput` returned for their pieces.
    """
    begun = CustomInput()
    text = begun.push(arguments)
    if begun.has_begun:
        return text + begun.finish()
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if isinstance(parsed, dict):
        texts = [value for value in parsed.values() if isinstance(value, str)]
        if isinstance(own := parsed.get(_ARGUMENT), str):
            return own
        return texts[0] if len(texts) == len(parsed) == 1 else arguments
    return parsed if isinstance(parsed, str) else arguments


def _schema(text: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    return {
        "type": "object",
        "properties": {_ARGUMENT: dict(text)},
        "required": [_ARGUMENT],
        "additionalProperties": False,
    }


def _matching(regex: str) -> Mapping[str, JsonValue]:
    return {"type": "string", "pattern": f"^(?:{regex})$"}
