"""Collects the parsed pieces of an answer: text, reasoning and calls of declared tools."""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence

from backends.answer.parser import Piece
from backends.tool_calls.cursor import Malformed
from backends.tool_calls.json_values import compact
from core.types import MismatchKind, ReasoningDelta, TextDelta, Tool, ToolCallDelta

_ID_CHARACTERS = string.ascii_letters + string.digits
_MAX_ID_CHARACTERS = 128
_MAX_MISMATCHES = 100

Check = Callable[[str, str], bool]


def new_call_id() -> str:
    """Return a new tool call id: `call_` and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(24))


class AnswerComplete(Exception):
    """Raised when the only allowed call is complete."""


class CallCollector:
    """Collects one answer's pieces; `check` validates a call's arguments against its schema.

    Calls that fail validation are still emitted and recorded in `mismatches`.
    """

    def __init__(self, tools: Sequence[Tool], *, is_parallel: bool, check: Check) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self.names = frozenset(self.tools)
        self.mismatches: list[MismatchKind] = []
        self.count = 0
        self.is_done = False
        self._is_parallel = is_parallel
        self._check = check
        self._pieces: list[Piece] = []
        self._ids: set[str] = set()
        self.open_name = ""
        self._arguments: list[str] = []

    @property
    def is_in_call(self) -> bool:
        """Whether a call, of `open_name`, has begun and is not complete."""
        return bool(self.open_name)

    def note_mismatch(self, kind: MismatchKind) -> None:
        """Record a problem with a call; of very many, only the first are kept."""
        if len(self.mismatches) < _MAX_MISMATCHES:
            self.mismatches.append(kind)

    def take(self) -> list[Piece]:
        """Return the pieces added since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def text(self, text: str) -> None:
        """Append to the answer's text."""
        if text:
            self._pieces.append(TextDelta(text))

    def reasoning(self, text: str) -> None:
        """Append to the reasoning."""
        if text:
            self._pieces.append(ReasoningDelta(text))

    def begin(self, name: str, call_id: str = "") -> None:
        """Begin a call; `call_id` is the model's own, if any.  Raises Malformed if undeclared."""
        if name not in self.names:
            self.note_mismatch("undeclared")
            raise Malformed
        if not call_id or call_id in self._ids or len(call_id) > _MAX_ID_CHARACTERS:
            call_id = new_call_id()
        self._ids.add(call_id)
        self._pieces.append(ToolCallDelta(self.count, call_id, name))
        self.count += 1
        self.open_name = name

    def arguments(self, text: str) -> None:
        """Append to the JSON text of the call's arguments."""
        if text:
            self._arguments.append(text)
            self._pieces.append(ToolCallDelta(self.count - 1, arguments=text))

    def finish(self) -> None:
        """End the call; missing arguments become an empty object.  Raises AnswerComplete."""
        if not self._arguments:
            self.arguments("{}")
        if not self._check(self.open_name, "".join(self._arguments)):
            self.note_mismatch("schema")
        self._end()
        if not self._is_parallel:
            self.is_done = True
            raise AnswerComplete

    def abandon(self) -> None:
        """Leave the open call, if any, unfinished."""
        if self.open_name:
            self.note_mismatch("malformed")
        self._end()

    def call(self, name: str, arguments: Mapping[str, object]) -> None:
        """Add a complete call.  Raises Malformed, AnswerComplete."""
        try:
            text = compact(arguments)
        except ValueError as problem:
            raise Malformed from problem
        self.begin(name)
        self.arguments(text)
        self.finish()

    def _end(self) -> None:
        self.open_name = ""
        self._arguments.clear()
