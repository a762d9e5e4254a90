"""Parsers of tool calls in Python syntax and in Gemma's notation."""

import json
import re
from collections.abc import Mapping

from backends.tool_calls.collector import CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps, Unfinished
from backends.tool_calls.json_forms import MAX_NAME_CHARACTERS
from backends.tool_calls.parser import Section
from backends.tool_calls.python_literals import Call, python_calls
from core.types import JsonValue

_MAX_CHARACTERS = 256 * 1024
_MAX_DEPTH = 64
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]{1,300})?(?:[eE][-+]?[0-9]{1,3})?")
_SPECIAL = re.compile(r"[\"'\[\](){}]")
_IN_QUOTE = {quote: re.compile(rf"[\\{quote}]") for quote in "\"'"}
_NAMES: Mapping[str, JsonValue] = {"true": True, "false": False, "null": None}


def pythonic(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
    """Read `[name(key=value, …), …]`; the calls are emitted once the list is closed."""
    del start
    yield from cursor.spaces()
    calls = yield from read_python_list(cursor, collector)
    for name, arguments in calls:
        collector.call(name, arguments)
    cursor.mark()
    yield from cursor.spaces()
    yield from cursor.accept("<|python_end|>", "<|tool_call_end|>")


def read_python_list(cursor: Cursor, collector: CallCollector) -> Steps[list[Call]]:
    """Return the calls of a list.  Raises Malformed unless all functions are declared."""
    yield from cursor.expect("[")
    opening = tuple(f"{name}(" for name in collector.names)
    yield from cursor.spaces()
    # Rejects a list of anything else at its first characters.
    name = yield from cursor.expect(*opening)
    text = yield from _read_brackets(cursor, f"[{name}")
    calls = python_calls(text)
    if any(name not in collector.names for name, _ in calls):
        collector.note_mismatch("undeclared")
        raise Malformed
    return calls


def _read_brackets(cursor: Cursor, opening: str) -> Steps[str]:
    """Return `opening`, which opens two brackets, and the text up to the end of both.

    Raises Malformed if it is too long, Unfinished if the text ends before.
    """
    read, left, brackets = [opening], _MAX_CHARACTERS, _Brackets(2)
    while True:
        text, start = cursor.window
        read.append(cursor.take(brackets.end(text, start, start + left) - start))
        left -= len(read[-1])
        if brackets.depth == 0:
            return "".join(read)
        if not left:
            raise Malformed
        if not (yield from cursor.more()):
            raise Unfinished


class _Brackets:
    """Tracks bracket depth outside quoted strings."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._quote = ""
        self._is_escaped = False

    def end(self, text: str, start: int, stop: int) -> int:
        """Return where in `text` the brackets end, or `stop` or its end if they do not."""
        stop = min(stop, len(text))
        while start < stop:
            if self._is_escaped:
                self._is_escaped = False
                start += 1
                continue
            pattern = _IN_QUOTE[self._quote] if self._quote else _SPECIAL
            found = pattern.search(text, start, stop)
            if found is None:
                break
            self._take(found[0])
            start = found.end()
            if not self.depth:
                return start
        return stop

    def _take(self, character: str) -> None:
        if self._quote:
            self._is_escaped = character == "\\"
            self._quote = self._quote if self._is_escaped else ""
        elif character in "\"'":
            self._quote = character
        else:
            self.depth += 1 if character in "[({" else -1


def gemma(quote: str, end: str) -> Section:
    """Return a reader of `call:name{key:value, …}` with `quote` around strings."""

    def section(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
        del start
        yield from cursor.spaces()
        yield from cursor.expect("call:")
        name, _ = yield from cursor.until("{", most=MAX_NAME_CHARACTERS)
        text, is_complete = yield from cursor.read_until(end, most=_MAX_CHARACTERS)
        if not is_complete:
            raise Malformed if cursor.available else Unfinished
        collector.call(name.strip(), _GemmaText("{" + text.rstrip(), quote).object())

    return section


class _GemmaText:
    """Parses one value in Gemma's notation: bare keys, and strings in a special quote."""

    def __init__(self, text: str, quote: str) -> None:
        self._text = text
        self._quote = quote
        self._at = 0
        self._depth = 0

    def object(self) -> dict[str, JsonValue]:
        """Parse the whole text as an object.  Raises Malformed."""
        value = self._value()
        if not isinstance(value, dict) or self._at != len(self._text):
            raise Malformed
        return value

    def _skip(self, literal: str) -> bool:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        if not self._text.startswith(literal, self._at):
            return False
        self._at += len(literal)
        return True

    def _quoted(self) -> str:
        end = self._text.find(self._quote, self._at)
        if end < 0:
            raise Malformed
        text, self._at = self._text[self._at : end], end + len(self._quote)
        return text

    def _value(self) -> JsonValue:
        if self._skip(self._quote):
            return self._quoted()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Malformed
        value = self._container()
        self._depth -= 1
        return value

    def _container(self) -> JsonValue:
        if self._skip("{"):
            members: dict[str, JsonValue] = {}
            while not self._skip("}"):
                if members and not self._skip(","):
                    raise Malformed
                members |= self._member()
            return members
        if self._skip("["):
            items: list[JsonValue] = []
            while not self._skip("]"):
                if items and not self._skip(","):
                    raise Malformed
                items.append(self._value())
            return items
        return self._scalar()

    def _member(self) -> dict[str, JsonValue]:
        if self._skip(self._quote):
            key = self._quoted()
        else:
            end = self._text.find(":", self._at)
            key = self._text[self._at : end].strip() if end >= 0 else ""
            self._at = max(end, self._at)
        if not key or not self._skip(":"):
            raise Malformed
        return {key: self._value()}

    def _scalar(self) -> JsonValue:
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] not in ",]}":
            self._at += 1
        word = self._text[begin : self._at].strip()
        if word in _NAMES:
            return _NAMES[word]
        if not _NUMBER.fullmatch(word):
            raise Malformed
        number: int | float = json.loads(word)
        return number
