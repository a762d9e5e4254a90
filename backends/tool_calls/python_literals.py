"""Parses a list of calls in Python syntax whose arguments are literals, in linear time.

Python's own parser recurses, and takes exponential time for some unfinished brackets.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias, TypeVar

from backends.tool_calls.cursor import Malformed
from core.types import JsonValue

_MAX_DEPTH = 100
_SPACE = re.compile(r"(?:[ \t\f\r\n]++|\\\r?\n|#[^\n]*+)*+")
_FUNCTION = re.compile(r"[^\s()\[\]{},=:'\"#]+")
_NAME = re.compile(r"[^\W\d]\w*+")
_STRING = re.compile(
    r"(?P<prefix>[rRuU]?)(?:"
    r"'''(?P<a>(?:[^'\\]|\\.|'(?!''))*+)'''|\"\"\"(?P<b>(?:[^\"\\]|\\.|\"(?!\"\"))*+)\"\"\"|"
    r"'(?P<c>(?:[^'\\\n]|\\.)*+)'|\"(?P<d>(?:[^\"\\\n]|\\.)*+)\")",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"0[xX](?:_?[0-9a-fA-F])++|0[oO](?:_?[0-7])++|0[bB](?:_?[01])++|"
    r"(?:[0-9](?:_?[0-9])*+)?\.[0-9](?:_?[0-9])*+(?:[eE][-+]?[0-9]++)?+|"
    r"[0-9](?:_?[0-9])*+\.?(?:[eE][-+]?[0-9]++)?+"
)
_ESCAPE = re.compile(
    r"\\(?:(?P<hex>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(?P<octal>[0-7]{1,3})|"
    r"N\{(?P<name>[^}]*)\}|(?P<one>.))",
    re.DOTALL,
)
_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\\": "\\", "'": "'", '"': '"', "\n": "",
}  # fmt: skip
_CONSTANTS: Mapping[str, JsonValue] = {
    "True": True, "False": False, "None": None, "true": True, "false": False, "null": None,
}  # fmt: skip

Call: TypeAlias = tuple[str, dict[str, JsonValue]]
Item = TypeVar("Item")


def python_calls(text: str) -> list[Call]:
    """Parse `[name(key=value, …), …]`.  Raises Malformed."""
    return _Reader(text).calls()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        # Whether the last list of items ended with a comma.
        self._has_comma = False

    def calls(self) -> list[Call]:
        """Parse the whole text."""
        self._expect("[")
        calls = self._items("]", self._call)
        self._skip_space()
        if not calls or self._at < len(self._text):
            _refuse()
        return calls

    def _skip_space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        if found is not None:
            self._at = found.end()

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self._skip_space()
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _accept(self, literal: str) -> bool:
        self._skip_space()
        if not self._text.startswith(literal, self._at):
            return False
        self._at += len(literal)
        return True

    def _expect(self, literal: str) -> None:
        if not self._accept(literal):
            _refuse()

    def _items(self, end: str, read: Callable[[], Item]) -> list[Item]:
        """Read items, separated by commas, and `end`."""
        items: list[Item] = []
        self._has_comma = False
        while not self._accept(end):
            if items and not self._has_comma:
                _refuse()
            items.append(read())
            self._has_comma = self._accept(",")
        return items

    def _call(self) -> Call:
        name = self._match(_FUNCTION)
        self._expect("(")
        pairs = self._items(")", self._keyword)
        if name is None or len(dict(pairs)) < len(pairs):
            _refuse()
        return name[0], dict(pairs)

    def _keyword(self) -> tuple[str, JsonValue]:
        name = self._match(_NAME)
        self._expect("=")
        if name is None:
            _refuse()
        return name[0], self._value()

    def _value(self) -> JsonValue:
        self._skip_space()
        if self._text[self._at : self._at + 1] in ("[", "(", "{"):
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                _refuse()
            container = self._container()
            self._depth -= 1
            return container
        text = self._strings()
        return self._scalar() if text is None else text

    def _container(self) -> JsonValue:
        if self._accept("["):
            return self._items("]", self._value)
        if self._accept("{"):
            return dict(self._items("}", self._member))
        self._expect("(")
        values = self._items(")", self._value)
        return values if len(values) != 1 or self._has_comma else values[0]

    def _member(self) -> tuple[str, JsonValue]:
        key = self._strings()
        self._expect(":")
        if key is None:
            _refuse()
        return key, self._value()

    def _strings(self) -> str | None:
        """Return adjacent strings, joined, or None if something else comes next."""
        texts: list[str] = []
        while (found := self._match(_STRING)) is not None:
            text = next(found[name] for name in "abcd" if found[name] is not None)
            texts.append(text if found["prefix"] in ("r", "R") else _ESCAPE.sub(_unescaped, text))
        return "".join(texts) if texts else None

    def _scalar(self) -> JsonValue:
        is_negative = self._accept("-")
        number = self._match(_NUMBER)
        if number is not None:
            value = _number(number[0])
            return -value if is_negative else value
        name = self._match(_NAME)
        if is_negative or name is None or name[0] not in _CONSTANTS:
            _refuse()
        return _CONSTANTS[name[0]]


def _refuse() -> NoReturn:
    raise Malformed


def _number(text: str) -> int | float:
    digits = text.replace("_", "")
    is_whole = digits.isdigit() or digits[1:2] in "xXoObB"
    try:
        return int(digits, 0) if is_whole else float(digits)
    except ValueError as problem:
        raise Malformed from problem


def _unescaped(found: re.Match[str]) -> str:
    """Return the character of an escape sequence; an unknown one stays as it is, as in Python."""
    try:
        if found["hex"]:
            return chr(int(found["hex"][1:], 16))
        if found["octal"]:
            return chr(int(found["octal"], 8))
        if found["name"]:
            return unicodedata.lookup(found["name"])
    except (ValueError, KeyError, OverflowError) as problem:
        raise Malformed from problem
    if found["one"] in ("x", "u", "U", "N"):
        raise Malformed
    return _ESCAPES.get(found["one"], found[0])
