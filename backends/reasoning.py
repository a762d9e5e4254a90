"""The incremental parser that keeps a model's reasoning apart from its answer."""

from collections.abc import Callable

from backends.text import OutputParser, Piece
from core.types import ReasoningDelta, TextDelta

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def split_held(text: str, marker: str) -> tuple[str, str]:
    """Split off the end of `text` that may be spaces, and the start of `marker`, yet to come."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            break
    else:
        length = 0
    kept = text[: len(text) - length].rstrip()
    return kept, text[len(kept) :]


class ReasoningParser:
    """Takes `<think>…</think>` at the answer's start for reasoning; the rest goes to `inner`.

    `is_open` says that the prompt ends with the opening tag.  Unclosed reasoning stays
    reasoning.  Space around both tags is dropped.
    """

    def __init__(self, inner: OutputParser | None, *, is_open: bool) -> None:
        self._inner = inner
        self._held = ""
        self._is_after = False
        self._is_fresh = True
        self._state: Callable[[str, list[Piece]], str] = self._think if is_open else self._start

    @property
    def is_done(self) -> bool:
        """Whether the inner parser is done."""
        return self._inner is not None and self._inner.is_done

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return what is certain by now."""
        pieces: list[Piece] = []
        while text:
            text = self._state(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """Return what was held back; the text ends here."""
        pieces: list[Piece] = []
        held, self._held = self._held, ""
        if self._state == self._think:
            if held.strip():
                pieces.append(ReasoningDelta(held))
        elif not self._is_after or held.strip():
            self._answer(held, pieces)
        if self._inner is not None:
            pieces += self._inner.flush()
        return pieces

    def _start(self, text: str, pieces: list[Piece]) -> str:
        text, self._held = self._held + text, ""
        begin = text.lstrip()
        if begin.startswith(THINK_OPEN):
            self._state, self._is_fresh = self._think, True
            return begin[len(THINK_OPEN) :]
        if THINK_OPEN.startswith(begin):
            self._held = text
            return ""
        self._state = self._answer
        return self._answer(begin if self._is_after else text, pieces)

    def _think(self, text: str, pieces: list[Piece]) -> str:
        text, self._held = self._held + text, ""
        if self._is_fresh:
            text = text.lstrip()
        before, tag, after = text.partition(THINK_CLOSE)
        if tag:
            thought = before.rstrip()
            self._state, self._is_after = self._start, True
        else:
            thought, self._held = split_held(text, THINK_CLOSE)
        if thought:
            self._is_fresh = False
            pieces.append(ReasoningDelta(thought))
        return after

    def _answer(self, text: str, pieces: list[Piece]) -> str:
        if self._inner is not None:
            pieces += self._inner.push(text)
        elif text:
            pieces.append(TextDelta(text))
        return ""
