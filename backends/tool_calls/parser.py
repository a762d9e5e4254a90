"""The one incremental parser of answers that may hold tool calls."""

from collections.abc import Callable, Sequence

from backends.answer.parser import Piece
from backends.tool_calls.collector import CallSink, Enough
from backends.tool_calls.cursor import Cursor, Malformed, Steps, Unfinished, held_length
from core.types import MismatchKind

Section = Callable[[Cursor, CallSink, str], Steps[None]]
Main = Callable[[Cursor, CallSink], Steps[None]]


class CallParser:
    """Runs a reader over a streamed answer; implements `backends.answer.parser.OutputParser`."""

    def __init__(self, main: Main, sink: CallSink) -> None:
        self._cursor = Cursor()
        self._sink = sink
        self._steps = main(self._cursor, sink)
        self._is_over = False

    @property
    def is_done(self) -> bool:
        """Whether the one call that is allowed is complete."""
        return self._sink.is_done

    @property
    def mismatches(self) -> Sequence[MismatchKind]:
        """What was wrong with the calls so far."""
        return self._sink.mismatches

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return what is certain by now."""
        if text and not self._is_over:
            self._cursor.feed(text)
            self._run()
        return self._sink.take()

    def flush(self) -> list[Piece]:
        """Return what was held back; the text ends here."""
        self._cursor.is_ended = True
        if not self._is_over:
            self._run()
        return self._sink.take()

    def _run(self) -> None:
        try:
            next(self._steps)
        except (StopIteration, Enough):
            self._is_over = True


def prose_with_calls(starts: tuple[str, ...], section: Section) -> Main:
    """Return a reader of prose in which `section` reads what follows one of `starts`.

    What is no well-formed call of a declared function comes out as the text it is; if a call
    breaks after its arguments began, they stay unfinished and the rest comes out as text.
    Space around calls is dropped.
    """

    def read(cursor: Cursor, sink: CallSink) -> Steps[None]:
        while True:
            start, gap = yield from _prose(cursor, sink, starts)
            if not start:
                return
            # The space before it is dropped only if a call follows.
            cursor.mark(back=gap + len(start))
            try:
                yield from section(cursor, sink, start)
            except Malformed as problem:
                if not sink.is_in_call:
                    sink.text(cursor.since_mark)
                    cursor.mark()
                elif not isinstance(problem, Unfinished):
                    sink.abandon()
                    cursor.unread(problem.pending)
                continue
            cursor.mark()
            yield from cursor.spaces()

    return read


def _prose(cursor: Cursor, sink: CallSink, starts: tuple[str, ...]) -> Steps[tuple[str, int]]:
    """Pass text on up to the next of `starts`, which is read; return nothing at the text's end.

    Also returns how many spaces before it were read and not passed on.
    """
    while True:
        text = cursor.rest
        found = min(((at, one) for one in starts if (at := text.find(one)) >= 0), default=None)
        if found is not None:
            before = text[: found[0]].rstrip()
            sink.text(before)
            cursor.advance(found[0] + len(found[1]))
            return found[1], found[0] - len(before)
        kept = text[: len(text) - held_length(text, starts)].rstrip()
        sink.text(kept)
        cursor.advance(len(kept))
        cursor.mark()
        if not (yield from cursor.more()):
            held = cursor.rest
            if held.strip() or not sink.count:
                sink.text(held)
            cursor.advance(len(held))
            return "", 0
