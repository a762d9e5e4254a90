"""Parses answers that consist only of tool calls, without a family's markers."""

from backends.tool_calls.collector import CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps
from backends.tool_calls.json_call import JsonCallReader
from backends.tool_calls.json_scanner import MalformedJson
from backends.tool_calls.literal_forms import read_python_list
from backends.tool_calls.parser import Main, Section, prose_with_calls

_JSON_OPENERS = ("<|python_tag|>", "```json", "```")
_FENCE = "```"


def answer_with_calls(starts: tuple[str, ...], section: Section, *, is_pythonic: bool) -> Main:
    """Return a reader of a whole answer: one bare call, or text with marked calls.

    A bare call is one JSON object, optionally in a code fence, or with `is_pythonic` a list in
    Python syntax.  It is held back until the end of the answer, since nothing else may follow.
    """
    prose = prose_with_calls(starts, section)
    openers = tuple(opener for opener in _JSON_OPENERS if opener not in starts)

    def read(cursor: Cursor, collector: CallCollector) -> Steps[None]:
        cursor.mark()
        try:
            if is_pythonic:
                yield from _list(cursor, collector)
            else:
                yield from _object(cursor, collector, openers)
        except Malformed:
            cursor.unread(cursor.since_mark)
            yield from prose(cursor, collector)

    return read


def _object(cursor: Cursor, collector: CallCollector, openers: tuple[str, ...]) -> Steps[None]:
    yield from cursor.spaces()
    for opener in openers:
        yield from cursor.accept(opener)
        yield from cursor.spaces()
    if cursor.peek(1) != "{":
        raise Malformed
    reader = JsonCallReader(collector.names)
    while not reader.is_complete:
        if not cursor.available and not (yield from cursor.more()):
            raise Malformed
        text, start = cursor.window
        try:
            reader.push(text, start)
        except MalformedJson as problem:
            raise Malformed from problem
        cursor.advance(reader.position - start)
    yield from _end(cursor)
    assert reader.name is not None
    collector.begin(reader.name)
    collector.arguments(reader.take())
    collector.finish()


def _end(cursor: Cursor) -> Steps[None]:
    """Skip the end of a code fence.  Raises Malformed if anything else follows."""
    yield from cursor.spaces()
    for _ in _FENCE:
        yield from cursor.accept("`")
    yield from cursor.spaces()
    if cursor.available:
        raise Malformed


def _list(cursor: Cursor, collector: CallCollector) -> Steps[None]:
    yield from cursor.spaces()
    calls = yield from read_python_list(cursor, collector)
    yield from cursor.spaces()
    if cursor.available:
        raise Malformed
    for name, arguments in calls:
        collector.call(name, arguments)
