"""Parsers of tool-call formats with JSON arguments."""

from backends.tool_calls.collector import CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps
from backends.tool_calls.json_call import JsonCallReader, JsonObjectReader
from backends.tool_calls.json_scanner import MalformedJson
from backends.tool_calls.parser import Section

MAX_NAME_CHARACTERS = 512


def read_call(cursor: Cursor, collector: CallCollector) -> Steps[None]:
    """Read one object with a name and arguments, emitted as they arrive.  Raises Malformed."""
    reader = JsonCallReader(collector.names)
    while not reader.is_complete:
        if not cursor.available and not (yield from cursor.more()):
            if not collector.is_in_call:
                raise Malformed
            collector.arguments(reader.pending)
            return
        is_broken = False
        text, start = cursor.window
        try:
            reader.push(text, start)
        except MalformedJson:
            is_broken = True
        cursor.advance(reader.position - start)
        if reader.is_undeclared:
            collector.note_mismatch("undeclared")
        if (
            not collector.is_in_call
            and reader.name
            and (reader.has_arguments or reader.is_complete)
        ):
            collector.begin(reader.name)
        if collector.is_in_call:
            collector.arguments(reader.take())
            # Text that was emitted need not be kept.
            cursor.mark()
        if is_broken:
            raise Malformed(reader.pending)
    collector.finish()


def read_arguments(cursor: Cursor, collector: CallCollector) -> Steps[None]:
    """Read the open call's arguments, one object, and end the call.  Raises Malformed."""
    reader = JsonObjectReader()
    while not reader.is_complete:
        if not cursor.available and not (yield from cursor.more()):
            collector.arguments(reader.pending)
            return
        text, start = cursor.window
        try:
            reader.push(text, start)
        except MalformedJson as problem:
            cursor.advance(reader.position - start)
            collector.arguments(reader.take())
            raise Malformed(reader.pending) from problem
        cursor.advance(reader.position - start)
        cursor.mark()
        collector.arguments(reader.take())
    collector.finish()


def read_calls(cursor: Cursor, collector: CallCollector) -> Steps[None]:
    """Read one call, or a list of them in brackets.  Raises Malformed."""
    yield from cursor.spaces()
    if not (yield from cursor.accept("[")):
        yield from read_call(cursor, collector)
        return
    yield from cursor.spaces()
    if (yield from cursor.accept("]")):
        return
    while True:
        yield from cursor.spaces()
        yield from read_call(cursor, collector)
        if collector.is_in_call:
            return
        cursor.mark()
        yield from cursor.spaces()
        separator = yield from cursor.accept(",", "]")
        if separator != ",":
            return


def tagged_json(*closing: str) -> Section:
    """Return a reader of one call or a list of calls; `closing` may follow and is dropped."""

    def section(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
        del start
        yield from read_calls(cursor, collector)
        cursor.mark()
        yield from cursor.spaces()
        yield from cursor.accept(*closing)

    return section


def python_tag(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
    """Read Llama's calls, separated by semicolons."""
    del start
    while True:
        yield from cursor.spaces()
        yield from read_call(cursor, collector)
        cursor.mark()
        yield from cursor.spaces()
        if not (yield from cursor.accept(";")):
            return


def mistral(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
    """Read `name[ARGS]{…}`, optionally with a `[CALL_ID]`, or a list of JSON calls."""
    del start
    yield from cursor.spaces()
    if not cursor.available:
        yield from cursor.more()
    if cursor.peek(1) in ("[", "{", ""):
        yield from read_calls(cursor, collector)
        return
    name, ender = yield from cursor.until("[ARGS]", "[CALL_ID]", most=MAX_NAME_CHARACTERS)
    call_id = ""
    if ender == "[CALL_ID]":
        call_id, _ = yield from cursor.until("[ARGS]", most=MAX_NAME_CHARACTERS)
    collector.begin(name.strip(), call_id)
    yield from cursor.spaces()
    yield from read_arguments(cursor, collector)


def kimi(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
    """Read calls whose id, `functions.<name>:<number>`, contains the name."""
    del start
    has_called = False
    while True:
        yield from cursor.spaces()
        marker = yield from cursor.accept("<|tool_call_begin|>", "<|tool_calls_section_end|>")
        if marker != "<|tool_call_begin|>":
            if not marker and not has_called:
                raise Malformed
            return
        text, _ = yield from cursor.until("<|tool_call_argument_begin|>", most=MAX_NAME_CHARACTERS)
        call_id = text.strip()
        collector.begin(call_id.removeprefix("functions.").rpartition(":")[0] or call_id, call_id)
        yield from cursor.spaces()
        yield from read_arguments(cursor, collector)
        if collector.is_in_call:
            return
        has_called = True
        cursor.mark()
        yield from cursor.spaces()
        yield from cursor.accept("<|tool_call_end|>")


_DEEPSEEK = {
    "open": "<｜tool▁call▁begin｜>",
    "separator": "<｜tool▁sep｜>",
    "close": "<｜tool▁call▁end｜>",
    "end": "<｜tool▁calls▁end｜>",
}


def deepseek(cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
    """Read calls of DeepSeek V3 (`function`, the name, fenced JSON) or V3.1 (name and JSON)."""
    del start
    has_called = False
    while True:
        yield from cursor.spaces()
        marker = yield from cursor.accept(_DEEPSEEK["open"], _DEEPSEEK["end"])
        if marker != _DEEPSEEK["open"]:
            if not marker and not has_called:
                raise Malformed
            return
        name, _ = yield from cursor.until(_DEEPSEEK["separator"], most=MAX_NAME_CHARACTERS)
        is_fenced = name.strip() == "function"
        if is_fenced:
            name, _ = yield from cursor.until("\n", most=MAX_NAME_CHARACTERS)
            yield from cursor.spaces()
            yield from cursor.expect("```json")
        collector.begin(name.strip())
        yield from cursor.spaces()
        yield from read_arguments(cursor, collector)
        if collector.is_in_call:
            return
        has_called = True
        cursor.mark()
        yield from cursor.spaces()
        if is_fenced:
            yield from cursor.accept("```")
            yield from cursor.spaces()
        yield from cursor.accept(_DEEPSEEK["close"])
