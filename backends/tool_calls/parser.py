"""Incremental parser of answers that may contain tool calls."""

from collections.abc import Callable, Sequence

from backends.answer.parser import Piece
from backends.tool_calls.collector import AnswerComplete, CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps, Unfinished, partial_marker_length
from core.types import MismatchKind

Section = Callable[[Cursor, CallCollector, str], Steps[None]]
Main = Callable[[Cursor, CallCollector], Steps[None]]


class CallParser:
    """Runs a generator-based reader over a stream; implements `answer.parser.OutputParser`."""

    def __init__(self, main: Main, collector: CallCollector) -> None:
        self._cursor = Cursor()
        self._collector = collector
        self._steps = main(self._cursor, collector)
        self._is_over = False

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
        if text and not self._is_over:
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


def prose_with_calls(starts: tuple[str, ...], section: Section) -> Main:
    """Return a reader of text in which `section` reads the call after one of `starts`.

    Anything that is not a well-formed call of a declared function is emitted as text.  If a call
    becomes malformed after its arguments began, they stay unfinished and the rest is text.
    Whitespace around calls is dropped.
    """

    def read(cursor: Cursor, collector: CallCollector) -> Steps[None]:
        while True:
            start, gap = yield from _prose(cursor, collector, starts)
            if not start:
                return
            # Whitespace before the marker is dropped only if a call follows.
            cursor.mark(back=gap + len(start))
            try:
                yield from section(cursor, collector, start)
            except Malformed as problem:
                if not collector.is_in_call:
                    collector.text(cursor.since_mark)
                    cursor.mark()
                elif not isinstance(problem, Unfinished):
                    collector.abandon()
                    cursor.unread(problem.pending)
                continue
            cursor.mark()
            yield from cursor.spaces()

    return read


def _prose(
    cursor: Cursor, collector: CallCollector, starts: tuple[str, ...]
) -> Steps[tuple[str, int]]:
    """Emit text up to the next of `starts`; return that marker, or "" at the end of the text.

    Also returns the number of whitespace characters before the marker, which were not emitted.
    """
    while True:
        text = cursor.rest
        found = min(((at, one) for one in starts if (at := text.find(one)) >= 0), default=None)
        if found is not None:
            before = text[: found[0]].rstrip()
            collector.text(before)
            cursor.advance(found[0] + len(found[1]))
            return found[1], found[0] - len(before)
        kept = text[: len(text) - partial_marker_length(text, starts)].rstrip()
        collector.text(kept)
        cursor.advance(len(kept))
        cursor.mark()
        if not (yield from cursor.more()):
            held = cursor.rest
            if held.strip() or not collector.count:
                collector.text(held)
            cursor.advance(len(held))
            return "", 0
