"""Incremental parser of one tool call written as a JSON object."""

import json

from backends.tool_calls.json_scanner import JsonScanner, MalformedJson

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
        self._texts: dict[str, str] = {}
        self._arguments = ""
        self._ended: set[str] = set()
        self.name: str | None = None
        self.is_undeclared = False
        self.position = 0

    @property
    def is_complete(self) -> bool:
        """Whether the object is closed."""
        return self._scanner.is_complete

    def push(self, text: str) -> None:
        """Parse `text`; `position` is then how much of it belongs to the call.

        Raises MalformedJson if it is not a call of a declared function.
        """
        self.position = 0
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
        taken, self._arguments = self._arguments, ""
        return taken

    @property
    def has_arguments(self) -> bool:
        """Whether the arguments' object has begun."""
        return any(self._texts.get(key, "").startswith("{") for key in _ARGUMENT_KEYS)

    def _take_value(self, key: str, piece: str) -> None:
        if key not in _CALL_KEYS or key in self._ended:
            raise MalformedJson
        if self._scanner.is_value_complete:
            self._ended.add(key)
        if key in _ARGUMENT_KEYS:
            self._take_arguments(key, piece)
        elif key in _NAME_KEYS and self.name is None:
            self._texts[key] = self._texts.get(key, "") + piece
            if self._scanner.is_value_complete:
                name = json.loads(self._texts[key])
                self.is_undeclared = isinstance(name, str) and name not in self._names
                if not isinstance(name, str) or self.is_undeclared:
                    raise MalformedJson
                self.name = name

    def _take_arguments(self, key: str, piece: str) -> None:
        if any(other in self._texts for other in _ARGUMENT_KEYS if other != key):
            raise MalformedJson
        if key not in self._texts:
            self._texts[key] = piece
        elif not self.has_arguments:
            self._texts[key] += piece
        if self.has_arguments:
            self._arguments += piece
        elif self._scanner.is_value_complete:
            self._arguments = _unquoted(self._texts[key])


def _unquoted(text: str) -> str:
    """Decode arguments written as JSON within a string, or as null, into an object's text."""
    value = json.loads(text)
    if value is None:
        return "{}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise MalformedJson from error
    if not isinstance(value, dict):
        raise MalformedJson
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class JsonObjectReader:
    """Parses one JSON object as its text arrives and rewrites it compactly."""

    def __init__(self) -> None:
        self._scanner = JsonScanner()
        # The scanner rewrites members' values, so the object is wrapped as one.
        opening, at = '{"object":', 0
        while at < len(opening):
            at, _ = self._scanner.read(opening, at)
        self._text = ""
        self._has_begun = False
        self.position = 0
        self.is_complete = False

    def push(self, text: str) -> None:
        """Parse `text`; `position` is then how much of it was used.  Raises MalformedJson."""
        self.position = 0
        while self.position < len(text) and not self.is_complete:
            self.position, piece = self._scanner.read(text, self.position)
            if piece and not self._has_begun and not piece.startswith("{"):
                raise MalformedJson
            self._has_begun = self._has_begun or bool(piece)
            self._text += piece
            self.is_complete = self._has_begun and self._scanner.is_value_complete

    @property
    def pending(self) -> str:
        """Text that was consumed but is incomplete, such as half a number."""
        return self._scanner.pending

    def take(self) -> str:
        """Return the object's new text."""
        taken, self._text = self._text, ""
        return taken
