"""Parses gpt-oss's harmony format, which separates reasoning, calls and answer by channel.

Source: OpenAI, "OpenAI harmony response format".
"""

import re

from backends.tool_calls.collector import CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps, partial_marker_length
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
    header = ""
    while True:
        try:
            text, ender = yield from cursor.until(MESSAGE, END, most=_MAX_HEADER_CHARACTERS)
        except Malformed:
            # No message header: the model left the format, so all its text is the answer.
            yield from _pass_text(cursor, collector, "final")
            return
        if ender == MESSAGE:
            header = text
            yield from _message(cursor, collector, header)
        cursor.mark()
        yield from cursor.spaces()
        if not cursor.rest and not (yield from cursor.more()):
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
        collector.mismatches.append("undeclared")
    yield from _pass_text(cursor, collector, channel[0] if channel else "final")


def _pass_text(cursor: Cursor, collector: CallCollector, channel: str) -> Steps[None]:
    """Emit a message's text up to its end, as it arrives."""
    emit = collector.reasoning if channel == "analysis" else collector.text
    while True:
        text = cursor.rest
        found = min(((at, one) for one in _ENDS if (at := text.find(one)) >= 0), default=None)
        if found is not None:
            emit(text[: found[0]])
            cursor.advance(found[0] + len(found[1]))
            return
        kept = text[: len(text) - partial_marker_length(text, _ENDS)]
        emit(kept)
        cursor.advance(len(kept))
        cursor.mark()
        if not (yield from cursor.more()):
            emit(cursor.rest)
            cursor.advance(len(cursor.rest))
            return
