"""Answers that begin as a bare call: how that is seen, and what must then follow."""

import re
from collections.abc import Sequence

from backends.grammar.compiler import GrammarText
from backends.grammar.constraint import OpeningCall
from backends.tool_calls.families import ToolFamily
from backends.tool_calls.grammar import call_body, json_call
from backends.tool_calls.grammar_forms import python_list
from core.types import Tool

# What may stand before it: see `backends.tool_calls.bare_calls`.
_BEFORE_JSON = rb"\s*(?:<\|python_tag\|>\s*)?(?:```(?:json)?\s*)?"
_FRAME_BYTES = 128


def opening_call(family: ToolFamily, tools: Sequence[Tool]) -> OpeningCall | None:
    """Return what tells that a whole answer is a call of one of `tools`, without markers.

    It does so with the name of a tool, so that other JSON and lists stay free.  None for a family
    that has no such calls.
    """
    if family.main is not None or not tools:
        return None
    names = b"|".join(re.escape(tool.name.encode()) for tool in tools)
    text = GrammarText(is_lenient=True)
    if family.is_pythonic:
        begin = rb"\s*(\[\s*(?:%b)\()" % names
        answer = python_list(text, tools, True)
    else:
        begin = rb'%b(\{\s*"name"\s*:\s*"(?:%b)")' % (_BEFORE_JSON, names)
        answer = json_call(text, tools)
    if family.is_word:
        begin += rb"|\s*%b(\[)" % re.escape(family.tool_call_start.encode())
        answer = f"({answer} | {call_body(family)(text, tools, True)})"
    longest = max(len(tool.name.encode()) for tool in tools)
    return OpeningCall(re.compile(begin), text.constraint(answer, "tools"), _FRAME_BYTES + longest)
