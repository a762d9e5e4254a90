"""Parsers of tool calls with arguments between tags: Qwen3-Coder, GLM, MiniMax, LongCat."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from backends.tool_calls.collector import CallCollector
from backends.tool_calls.cursor import Cursor, Malformed, Steps, Unfinished
from backends.tool_calls.json_forms import MAX_NAME_CHARACTERS
from backends.tool_calls.json_values import compact
from backends.tool_calls.schemas import from_text, types_of
from core.types import JsonValue

_MAX_VALUE_CHARACTERS = 4 * 2**20


@dataclass(frozen=True, slots=True)
class TagForm:
    """The tags of a family's calls and parameters.

    The name is between `name_open` and one of `name_close`; the parameters follow, then `close`.
    `is_padded`: one line break before and one after a value are not part of it.
    """

    name_open: str
    name_close: tuple[str, ...]
    key_open: str
    key_close: str
    value_open: str
    value_close: str
    close: str
    end: str
    is_padded: bool = False


QWEN_CODER = TagForm(
    "<function=", (">",), "<parameter=", ">", "", "</parameter>", "</function>", "</tool_call>",
    is_padded=True,
)  # fmt: skip
MINIMAX = TagForm(
    '<invoke name="', ('">',), '<parameter name="', '">', "", "</parameter>", "</invoke>",
    "</minimax:tool_call>",
)  # fmt: skip
GLM = TagForm(
    "", ("\n", "<arg_key>", "</tool_call>"), "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "</tool_call>", "",
)  # fmt: skip
LONGCAT = TagForm(
    "", ("\n", "<longcat_arg_key>", "</longcat_tool_call>"), "<longcat_arg_key>",
    "</longcat_arg_key>", "<longcat_arg_value>", "</longcat_arg_value>", "</longcat_tool_call>", "",
)  # fmt: skip


class TagReader:
    """Parses calls in one tag format; each call ends with `close`."""

    def __init__(self, form: TagForm) -> None:
        self._form = form

    def __call__(self, cursor: Cursor, collector: CallCollector, start: str) -> Steps[None]:
        """Read calls up to the section's end, which may be missing."""
        form = self._form
        is_open = start == form.name_open or not form.name_open
        has_called = False
        while True:
            if not is_open:
                yield from cursor.spaces()
                tag = yield from cursor.accept(form.name_open, form.end)
                if tag != form.name_open:
                    if not tag and not has_called:
                        raise Malformed
                    return
            is_open = False
            yield from self._call(cursor, collector)
            cursor.mark()
            has_called = True
            if collector.is_in_call or not form.name_open:
                return

    def _call(self, cursor: Cursor, collector: CallCollector) -> Steps[None]:
        form = self._form
        yield from cursor.spaces()
        name, ender = yield from cursor.until(*form.name_close, most=MAX_NAME_CHARACTERS)
        collector.begin(name.strip())
        keys: set[str] = set()
        tag = ender if ender in (form.key_open, form.close) else ""
        while True:
            # All before the tag was emitted; what follows is text if it is malformed.
            cursor.mark(back=len(tag))
            if not tag:
                yield from cursor.spaces()
                tag = yield from cursor.accept(form.key_open, form.close)
            if tag == form.close:
                collector.arguments("}" if keys else "{}")
                collector.finish()
                return
            if not (tag or cursor.available):
                return
            try:
                if not tag:
                    raise Malformed
                yield from self._parameter(cursor, collector, keys)
            except Unfinished:
                raise
            except Malformed as problem:
                raise Malformed(cursor.since_mark) from problem
            tag = ""

    def _parameter(self, cursor: Cursor, collector: CallCollector, keys: set[str]) -> Steps[None]:
        """Read a parameter after the tag that opens its key, and add the key to `keys`."""
        form = self._form
        key, _ = yield from cursor.until(form.key_close, most=MAX_NAME_CHARACTERS)
        if key in keys:
            raise Malformed
        if form.value_open:
            yield from cursor.spaces()
            yield from cursor.expect(form.value_open)
        opening = f"{',' if keys else '{'}{compact(key)}:"
        keys.add(key)
        root = collector.tools[collector.open_name].parameters
        types = types_of(self._schemas(root).get(key), root)
        if types == {"string"}:
            collector.arguments(opening + '"')
            yield from self._text_value(cursor, collector)
            collector.arguments('"')
            return
        text, is_complete = yield from cursor.read_until(
            form.value_close, most=_MAX_VALUE_CHARACTERS
        )
        if not is_complete:
            collector.arguments(opening + text)
            cursor.mark()
            raise Malformed if cursor.available else Unfinished
        if form.is_padded:
            text = text.removeprefix("\n").removesuffix("\n")
        collector.arguments(opening + compact(from_text(text, types)))

    @staticmethod
    def _schemas(root: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        properties = root.get("properties")
        return properties if isinstance(properties, dict) else {}

    def _text_value(self, cursor: Cursor, collector: CallCollector) -> Steps[None]:
        """Emit a string value, escaped, as it arrives."""
        form = self._form
        if form.is_padded:
            yield from cursor.accept("\n")
        # Text that may be the padding or the closing tag is held back.
        closings = (form.value_close, f"\n{form.value_close}")
        while True:
            ahead, _ = cursor.find(form.value_close)
            if ahead >= 0:
                value = cursor.take(ahead)
                value = value.removesuffix("\n") if form.is_padded else value
                collector.arguments(json.dumps(value, ensure_ascii=False)[1:-1])
                cursor.advance(len(form.value_close))
                return
            kept = cursor.take(cursor.available - cursor.partial(closings))
            collector.arguments(json.dumps(kept, ensure_ascii=False)[1:-1])
            cursor.mark()
            if not (yield from cursor.more()):
                rest = cursor.take(cursor.available)
                collector.arguments(json.dumps(rest, ensure_ascii=False)[1:-1])
                raise Unfinished
