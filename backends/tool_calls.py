"""Incremental parsers of tool calls, in the forms that models write them."""

import re
import secrets
import string
from collections.abc import Callable

from backends.call_reader import CallReader
from backends.json_scanner import MalformedJson
from backends.reasoning import split_held
from backends.text import OutputParser, Piece
from core.types import TextDelta, ToolCallDelta

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"

_BARE_OPENERS = ("<|python_tag|>", "```json", "```")
_BARE_END = re.compile(r"\s*`{0,3}\s*")
_ID_CHARACTERS = string.ascii_letters + string.digits


def new_call_id() -> str:
    """Return a fresh id of a tool call: `call_` and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(24))


class ToolCallParser:
    """Takes `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen) for calls.

    Arguments stream as they grow, rewritten as compact JSON.  What is no well-formed call of a
    declared function comes out as the text it is; if a call breaks after its arguments began,
    they stay unfinished and the rest comes out as text.  Space around calls is dropped.
    """

    def __init__(self, names: frozenset[str], *, is_parallel: bool) -> None:
        self._names = names
        self._is_parallel = is_parallel
        self._state: Callable[[str, list[Piece]], str] = self._prose
        self._held = ""
        self._raw = ""
        self._reader = CallReader(names)
        self._is_named = False
        self._count = 0
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """Whether the one call that is allowed is complete."""
        return self._is_done

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return what is certain by now."""
        pieces: list[Piece] = []
        while text and not self._is_done:
            text = self._state(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """Return what was held back; the text ends here."""
        held, self._held = self._held, ""
        pieces: list[Piece] = []
        if self._state == self._call and not self._is_named:
            held = CALL_OPEN + self._raw
        elif self._state == self._call:
            held = ""
            if self._reader.pending:
                pieces.append(ToolCallDelta(self._count - 1, arguments=self._reader.pending))
        elif self._state != self._prose or (self._count and not held.strip()):
            held = ""
        self._state = self._prose
        return [*pieces, TextDelta(held)] if held else pieces

    def _prose(self, text: str, pieces: list[Piece]) -> str:
        text, self._held = self._held + text, ""
        before, tag, after = text.partition(CALL_OPEN)
        if tag:
            before = before.rstrip()
            self._reader, self._raw, self._is_named = CallReader(self._names), "", False
            self._state = self._call
        else:
            before, self._held = split_held(text, CALL_OPEN)
        if before:
            pieces.append(TextDelta(before))
        return after

    def _call(self, text: str, pieces: list[Piece]) -> str:
        reader = self._reader
        try:
            reader.push(text)
        except MalformedJson:
            self._state = self._prose
            self._name_call(pieces)
            if self._is_named:
                self._send_arguments(pieces)
                return reader.pending + text[reader.position :]
            broken = CALL_OPEN + self._raw + text[: reader.position]
            pieces.append(TextDelta(broken))
            return text[reader.position :]
        if not self._is_named:
            self._raw += text[: reader.position]
        self._name_call(pieces)
        if self._is_named:
            self._send_arguments(pieces, is_last=reader.is_complete)
        if reader.is_complete:
            self._state = self._after
            self._is_done = not self._is_parallel
        return text[reader.position :]

    def _name_call(self, pieces: list[Piece]) -> None:
        reader = self._reader
        is_known = reader.name is not None and (reader.has_arguments or reader.is_complete)
        if is_known and not self._is_named:
            self._is_named = True
            pieces.append(ToolCallDelta(self._count, new_call_id(), reader.name))
            self._count += 1

    def _send_arguments(self, pieces: list[Piece], *, is_last: bool = False) -> None:
        text = self._reader.take()
        if is_last and not text and not self._reader.has_arguments:
            text = "{}"
        if text:
            pieces.append(ToolCallDelta(self._count - 1, arguments=text))

    def _after(self, text: str, pieces: list[Piece]) -> str:  # noqa: ARG002
        text, self._held = (self._held + text).lstrip(), ""
        if CALL_CLOSE.startswith(text) and text != CALL_CLOSE:
            self._held = text
            return ""
        self._state = self._space
        return text.removeprefix(CALL_CLOSE)

    def _space(self, text: str, pieces: list[Piece]) -> str:  # noqa: ARG002
        text = text.lstrip()
        if text:
            self._state = self._prose
        return text


class BareCallParser:
    """Takes an answer that is nothing but one JSON call (Llama 3.1) for a call.

    The object may stand in a code fence or after `<|python_tag|>`, its arguments may be named
    `parameters`.  It is held back until the answer's end shows that nothing else follows; any
    other answer goes to `inner` as soon as it is known to be none.
    """

    def __init__(self, names: frozenset[str], inner: OutputParser) -> None:
        self._inner = inner
        self._raw = ""
        self._reader = CallReader(names)
        self._is_reading = False
        self._is_inner = False

    @property
    def is_done(self) -> bool:
        """Whether the inner parser is done; a bare call is known at the end only."""
        return self._is_inner and self._inner.is_done

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return what is certain by now."""
        if self._is_inner:
            return self._inner.push(text)
        self._raw += text
        try:
            self._read(text)
        except MalformedJson:
            return self._hand_over()
        return []

    def flush(self) -> list[Piece]:
        """Return what was held back; the text ends here."""
        if self._is_inner:
            return self._inner.flush()
        if not self._reader.is_complete:
            return [*self._hand_over(), *self._inner.flush()]
        self._is_inner = True
        name, arguments = self._reader.name, self._reader.take() or "{}"
        return [ToolCallDelta(0, new_call_id(), name, arguments)]

    def _hand_over(self) -> list[Piece]:
        self._is_inner = True
        raw, self._raw = self._raw, ""
        return self._inner.push(raw) if raw else []

    def _read(self, text: str) -> None:
        """Read on; raises MalformedJson once the answer cannot be a bare call."""
        if not self._is_reading:
            text = _after_openers(self._raw)
            if not text:
                return
            self._is_reading = True
        if not self._reader.is_complete:
            self._reader.push(text)
            text = text[self._reader.position :]
        if text and not _BARE_END.fullmatch(text):
            raise MalformedJson


def _after_openers(raw: str) -> str:
    """Return the text from the object's brace on, or nothing while it may still come."""
    rest = raw.lstrip()
    for opener in _BARE_OPENERS:
        if rest and rest != opener and opener.startswith(rest):
            return ""
        rest = rest.removeprefix(opener).lstrip()
    if rest and not rest.startswith("{"):
        raise MalformedJson
    return rest
