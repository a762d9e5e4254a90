"""Incremental parser of one tool call written as a JSON object."""

import json

from backends.tool_calls.json_scanner import JsonScanner, MalformedJson
from backends.tool_calls.json_values import compact, parse_json

_ARGUMENT_KEYS = ("arguments", "parameters")
_NAME_KEYS = ("name", "tool_name")
_CALL_KEYS = frozenset({*_NAME_KEYS, "type", "id", "tool_call_id", *_ARGUMENT_KEYS})


class JsonCallReader:
    """Parses one call, `{"name": …, "arguments": {…}}`, as its text arrives.

    `tool_name` is also accepted for `name`, and `parameters` for `arguments`.  `take` returns the
    compact JSON text of the arguments.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._scanner = JsonScanner()
        self._texts: dict[str, list[str]] = {}
        self._arguments: list[str] = []
        self._ended: set[str] = set()
        self.name: str | None = None
        self.is_undeclared = False
        self.position = 0

    @property
    def is_complete(self) -> bool:
        """Whether the object is closed."""
        return self._scanner.is_complete

    def push(self, text: str, position: int = 0) -> None:
        """Parse `text` from `position` on; `self.position` is then the end of what was used.

        Raises MalformedJson if it is not a call of a declared function.
        """
        self.position = position
        while self.position < len(text) and not self._scanner.is_complete:
            self.position, piece = self._scanner.read(text, self.position)
            key = self._scanner.key
            if key is not None and piece:
                self._take_value(key, piece)
        if self._scanner.is_complete and self.name is None:
            raise MalformedJson

    @property
    def pending(self) -> str:
        """Text that was consumed but is incomplete, such as half a number."""
        return self._scanner.pending

    def take(self) -> str:
        """Return the new text of the arguments; empty until the name is known."""
        if self.name is None:
            return ""
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    @property
    def has_arguments(self) -> bool:
        """Whether the arguments' object has begun."""
        return any(self._texts.get(key, ("",))[0].startswith("{") for key in _ARGUMENT_KEYS)

    def _take_value(self, key: str, piece: str) -> None:
        if key not in _CALL_KEYS or key in self._ended:
            raise MalformedJson
        if self._scanner.is_value_complete:
            self._ended.add(key)
        if key in _ARGUMENT_KEYS:
            self._take_arguments(key, piece)
        elif key in _NAME_KEYS and self.name is None:
            self._texts.setdefault(key, []).append(piece)
            if self._scanner.is_value_complete:
                name = json.loads("".join(self._texts[key]))
                self.is_undeclared = isinstance(name, str) and name not in self._names
                if not isinstance(name, str) or self.is_undeclared:
                    raise MalformedJson
                self.name = name

    def _take_arguments(self, key: str, piece: str) -> None:
        if any(other in self._texts for other in _ARGUMENT_KEYS if other != key):
            raise MalformedJson
        if key not in self._texts or not self.has_arguments:
            self._texts.setdefault(key, []).append(piece)
        if self.has_arguments:
            self._arguments.append(piece)
        elif self._scanner.is_value_complete:
            self._arguments.append(_unquoted("".join(self._texts[key])))


def _unquoted(text: str) -> str:
    """Decode arguments written as JSON within a string, or as null, into an object's text."""
    try:
        value = parse_json(text)
        if value is None:
            return "{}"
        if isinstance(value, str):
            value = parse_json(value)
        if isinstance(value, dict):
            return compact(value)
    except ValueError as error:
        raise MalformedJson from error
    raise MalformedJson


class JsonObjectReader:
    """Parses one JSON object as its text arrives and rewrites it compactly."""

    def __init__(self) -> None:
        self._scanner = JsonScanner()
        # The scanner rewrites members' values, so the object is wrapped as one.
        opening, at = '{"object":', 0
        while at < len(opening):
            at, _ = self._scanner.read(opening, at)
        self._texts: list[str] = []
        self._has_begun = False
        self.position = 0
        self.is_complete = False

    def push(self, text: str, position: int = 0) -> None:
        """Parse `text` from `position` on; `self.position` is then the end of what was used.

        Raises MalformedJson.
        """
        self.position = position
        while self.position < len(text) and not self.is_complete:
            self.position, piece = self._scanner.read(text, self.position)
            if piece and not self._has_begun and not piece.startswith("{"):
                raise MalformedJson
            self._has_begun = self._has_begun or bool(piece)
            self._texts.append(piece)
            self.is_complete = self._has_begun and self._scanner.is_value_complete

    @property
    def pending(self) -> str:
        """Text that was consumed but is incomplete, such as half a number."""
        return self._scanner.pending

    def take(self) -> str:
        """Return the object's new text."""
        taken = "".join(self._texts)
        self._texts.clear()
        return taken
