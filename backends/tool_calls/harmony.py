"""Parses gpt-oss's harmony format, which separates reasoning, calls and answer by channel.

Source: OpenAI, "OpenAI harmony response format".
"""

import re

from backends.tool_calls.collector import CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps
from backends.tool_calls.json_forms import read_arguments

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CALL, RETURN, CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"
# Markers that precede an answer without reasoning.
FINAL = (CHANNEL, "final", MESSAGE)
MARKERS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_MAX_HEADER_CHARACTERS = 1024
_ENDS = (END, CALL, RETURN, START)


def read_harmony(cursor: Cursor, collector: CallCollector) -> Steps[None]:
    """Read messages; the first header continues the prompt's `<|start|>assistant`."""
    while True:
        cursor.mark()
        try:
            text, ender = yield from cursor.until(MESSAGE, END, most=_MAX_HEADER_CHARACTERS)
        except Malformed:
            # No message header: the model left the format, so all its text is the answer.
            collector.text(cursor.since_mark)
            cursor.mark()
            yield from _pass_text(cursor, collector, "final")
        else:
            if ender == MESSAGE:
                yield from _message(cursor, collector, text)
            elif not any(marker in text for marker in MARKERS):
                collector.text(text)
        cursor.mark()
        yield from cursor.spaces()
        if not cursor.available and not (yield from cursor.more()):
            return


def _message(cursor: Cursor, collector: CallCollector, header: str) -> Steps[None]:
    channel = header.partition(CHANNEL)[2].split("<", 1)[0].split()
    recipient = _RECIPIENT.search(header)
    name = recipient[1] if recipient else ""
    if name in collector.names:
        cursor.mark()
        collector.begin(name)
        try:
            yield from cursor.spaces()
            yield from read_arguments(cursor, collector)
            if collector.is_in_call:
                return
        except Malformed as problem:
            collector.abandon()
            cursor.unread(problem.pending)
        yield from _pass_text(cursor, collector, "final")
        return
    if name:
        collector.note_mismatch("undeclared")
    yield from _pass_text(cursor, collector, channel[0] if channel else "final")


def _pass_text(cursor: Cursor, collector: CallCollector, channel: str) -> Steps[None]:
    """Emit a message's text up to its end, as it arrives."""
    emit = collector.reasoning if channel == "analysis" else collector.text
    while True:
        ahead, end = cursor.find(*_ENDS)
        emit(cursor.take(ahead if end else cursor.available - cursor.partial(_ENDS)))
        if end:
            cursor.advance(len(end))
            return
        cursor.mark()
        if not (yield from cursor.more()):
            emit(cursor.take(cursor.available))
            return
