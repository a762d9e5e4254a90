"""Incremental scanner of one JSON object, for tool calls that arrive in chunks."""

import json
import re
from typing import Literal, TypeAlias

from core.text import MAX_JSON_DEPTH

_Expected: TypeAlias = Literal["value", "value or end", "key", "key or end", "colon", "next"]

_SPACE = " \t\n\r"
_SPACES = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGINNING = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_HIGH, _LOW = re.compile(r"\\u[dD][89abAB]"), re.compile(r"\\u[dD][c-fC-F]")
# Strict JSON parsers refuse a lone surrogate, even as an escape.
_REPLACEMENT = r"\ufffd"
_CLOSERS = {"{": "}", "[": "]"}
_SCALAR_CHARACTERS = 400
# Bounded, since text that is refused here is searched again for the next call.
_SCALAR = re.compile(rf"[-+.0-9A-Za-z]{{1,{_SCALAR_CHARACTERS + 1}}}")


class MalformedJson(Exception):
    """The text is not a valid JSON object of the expected kind."""


class JsonScanner:
    """Validates one JSON object as its text arrives and rewrites its members' values compactly.

    Raw control characters within strings are escaped, not rejected: small models write line
    breaks that way.  Lone surrogates are replaced.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._expected: _Expected = "value"
        self._in_string = False
        self._is_key = False
        self._escape = ""
        self._scalar = ""
        self._high_surrogate = ""
        self._key_texts: list[str] = []
        self.key: str | None = None
        self.is_complete = False

    @property
    def is_value_complete(self) -> bool:
        """Whether the value of the top-level member `key` has ended."""
        return len(self._open) == 1 and self._expected == "next" and not self._in_string

    @property
    def pending(self) -> str:
        """The start of a number, word or escape sequence that is not complete yet."""
        return self._scalar + self._high_surrogate + self._escape

    def read(self, text: str, position: int) -> tuple[int, str]:
        """Read part of `text`; return the new position and the text added to `key`'s value.

        A number ends only at the next character, which is then not consumed.
        Raises MalformedJson.
        """
        if self._in_string:
            return self._read_string(text, position)
        scalar = _SCALAR.match(text, position)
        if scalar is not None:
            return self._read_scalar(scalar[0], scalar.end(), len(text))
        if self._scalar:
            return position, self._end_scalar(self._scalar)
        spaces = _SPACES.match(text, position)
        if spaces is not None:
            return spaces.end(), ""
        return position + 1, self._read_punctuation(text[position])

    def _read_string(self, text: str, position: int) -> tuple[int, str]:
        if self._escape:
            escape = self._escape + text[position]
            if _ESCAPE.fullmatch(escape):
                self._escape = ""
                return position + 1, self._value_text(self._paired(escape))
            if not _ESCAPE_BEGINNING.fullmatch(escape):
                raise MalformedJson
            self._escape = escape
            return position + 1, ""
        character = text[position]
        if character == "\\":
            self._escape = character
            return position + 1, ""
        if self._high_surrogate:
            self._high_surrogate = ""
            return position, self._value_text(_REPLACEMENT)
        plain = _PLAIN.match(text, position)
        if plain is not None:
            return plain.end(), self._value_text(plain[0])
        if character != '"':
            return position + 1, self._value_text(json.dumps(character)[1:-1])
        self._in_string = False
        piece = self._value_text('"')
        if self._is_key:
            self._is_key = False
            self._expected = "colon"
        else:
            self._expected = "next"
        return position + 1, piece

    def _paired(self, escape: str) -> str:
        """Return `escape` with the surrogate before it; a lone surrogate is replaced."""
        held, self._high_surrogate = self._high_surrogate, ""
        lone = _REPLACEMENT if held else ""
        if _HIGH.match(escape):
            self._high_surrogate = escape
            return lone
        if _LOW.match(escape):
            return held + escape if held else _REPLACEMENT
        return lone + escape

    def _read_scalar(self, run: str, end: int, length: int) -> tuple[int, str]:
        if self._expected not in ("value", "value or end") or not self._open:
            raise MalformedJson
        scalar = self._scalar + run
        if len(scalar) > _SCALAR_CHARACTERS:
            raise MalformedJson
        if end < length:
            return end, self._end_scalar(scalar)
        self._scalar = scalar
        return end, ""

    def _end_scalar(self, scalar: str) -> str:
        if scalar not in ("true", "false", "null") and not _NUMBER.fullmatch(scalar):
            raise MalformedJson
        self._scalar = ""
        self._expected = "next"
        return self._value_text(scalar)

    def _read_punctuation(self, character: str) -> str:
        if character == '"':
            return self._begin_string()
        if character in "{[":
            return self._begin_container(character)
        if character in "}]":
            return self._end_container(character)
        if character == ":" and self._expected == "colon":
            self._expected = "value"
            if len(self._open) == 1:
                self.key = str(json.loads("".join(self._key_texts)))
                return ""
            return ":"
        if character == "," and self._expected == "next":
            self._expected = "key" if self._open[-1] == "{" else "value"
            if len(self._open) == 1:
                self.key = None
                return ""
            return ","
        raise MalformedJson

    def _begin_string(self) -> str:
        if self._expected in ("colon", "next") or not self._open:
            raise MalformedJson
        self._in_string = True
        self._is_key = self._expected in ("key", "key or end")
        if self._is_key and len(self._open) == 1:
            self._key_texts.clear()
        return self._value_text('"')

    def _begin_container(self, character: str) -> str:
        is_first = not self._open
        if self._expected not in ("value", "value or end") or (is_first and character == "["):
            raise MalformedJson
        if len(self._open) >= MAX_JSON_DEPTH:
            raise MalformedJson
        self._open.append(character)
        self._expected = "key or end" if character == "{" else "value or end"
        return "" if is_first else character

    def _end_container(self, character: str) -> str:
        may_end = ("next", "key or end") if character == "}" else ("next", "value or end")
        if self._expected not in may_end or _CLOSERS[self._open[-1]] != character:
            raise MalformedJson
        self._open.pop()
        self._expected = "next"
        if not self._open:
            self.is_complete = True
            self.key = None
            return ""
        return character

    def _value_text(self, piece: str) -> str:
        """Return `piece` if it belongs to a value; collect it if it belongs to a top-level key."""
        if self._is_key and len(self._open) == 1:
            self._key_texts.append(piece)
            return ""
        return piece
