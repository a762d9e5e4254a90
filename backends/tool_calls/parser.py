"""Incremental parser of answers that may contain tool calls."""

import logging
from collections.abc import Callable, Sequence

from backends.answer.parser import Piece
from backends.tool_calls.collector import AnswerComplete, CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps, Unfinished
from core.types import MismatchKind

logger = logging.getLogger(__name__)

Section = Callable[[Cursor, CallCollector, str], Steps[None]]
Main = Callable[[Cursor, CallCollector], Steps[None]]


class CallParser:
    """Runs a generator-based reader over a stream; implements `answer.parser.OutputParser`.

    Never raises: after an unexpected error (`has_failed`), the rest of the answer is text.
    """

    def __init__(self, main: Main, collector: CallCollector) -> None:
        self._cursor = Cursor()
        self._collector = collector
        self._steps = main(self._cursor, collector)
        self._is_over = False
        self.has_failed = False

    @property
    def is_done(self) -> bool:
        """Whether the only allowed call is complete."""
        return self._collector.is_done

    @property
    def mismatches(self) -> Sequence[MismatchKind]:
        """Problems with the calls so far."""
        return self._collector.mismatches

    def push(self, text: str) -> list[Piece]:
        """Parse the next text; return the pieces that are certain by now."""
        if self.has_failed:
            self._collector.text(text)
        elif text and not self._is_over:
            self._cursor.feed(text)
            self._run()
        return self._collector.take()

    def flush(self) -> list[Piece]:
        """End the text; return the pieces that were held back."""
        self._cursor.is_ended = True
        if not self._is_over:
            self._run()
        return self._collector.take()

    def _run(self) -> None:
        try:
            next(self._steps)
        except (StopIteration, AnswerComplete):
            self._is_over = True
        except Exception:
            # A bug here must not cost the answer, nor the other requests of the engine.
            logger.exception("cannot parse an answer's tool calls; the rest is sent as text")
            self._is_over = self.has_failed = True
            self._collector.abandon()
            self._collector.text(self._cursor.since_mark)
            self._collector.text(self._cursor.take(self._cursor.available))


def prose_with_calls(starts: tuple[str, ...], section: Section) -> Main:
    """Return a reader of text in which `section` reads the call after one of `starts`.

    Anything that is not a well-formed call of a declared function is emitted as text.  If a call
    becomes malformed after its arguments began, they stay unfinished and the rest is text.
    Whitespace around calls is dropped.
    """

    def read(cursor: Cursor, collector: CallCollector) -> Steps[None]:
        while True:
            start = yield from _prose(cursor, collector, starts)
            if not start:
                return
            try:
                yield from section(cursor, collector, start)
            except Malformed as problem:
                if not collector.is_in_call:
                    read_text = cursor.since_mark
                    collector.text(read_text.removesuffix(problem.pending))
                    cursor.unread(problem.pending)
                elif not isinstance(problem, Unfinished):
                    collector.abandon()
                    cursor.unread(problem.pending)
                continue
            cursor.mark()
            yield from cursor.spaces()
            cursor.mark()

    return read


def _prose(cursor: Cursor, collector: CallCollector, starts: tuple[str, ...]) -> Steps[str]:
    """Emit text up to the next of `starts`; return that marker, or "" at the end of the text.

    Whitespace before the marker is read after the cursor's mark and not emitted: it is dropped only
    if a call follows.
    """
    while True:
        ahead, start = cursor.find(*starts)
        text = cursor.take(ahead if start else cursor.available - cursor.partial(starts))
        spaces = len(text) - len(text.rstrip())
        if spaces < len(text):
            read_text = cursor.since_mark
            collector.text(read_text[: len(read_text) - spaces])
            cursor.mark(back=spaces)
        if start:
            cursor.advance(len(start))
            return start
        if not (yield from cursor.more()):
            cursor.advance(cursor.available)
            held = cursor.since_mark
            if held.strip() or not collector.count:
                collector.text(held)
            cursor.mark()
            return ""
