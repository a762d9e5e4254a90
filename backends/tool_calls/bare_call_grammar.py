"""Builds the grammar that constrains an answer once it starts as a bare (unmarked) tool call."""

import re
from collections.abc import Sequence

from backends.grammar.compiler import GrammarText
from backends.grammar.constraint import BareCallGrammar
from backends.tool_calls.families import ToolFamily
from backends.tool_calls.grammar import call_body, json_call
from backends.tool_calls.grammar_forms import python_list
from core.types import Tool

# Text allowed before the call, as `backends.tool_calls.bare_calls` accepts it.
_BEFORE_JSON = rb"\s*(?:<\|python_tag\|>\s*)?(?:```(?:json)?\s*)?"
_MAX_PREFIX_BYTES = 128


def bare_call_grammar(family: ToolFamily, tools: Sequence[Tool]) -> BareCallGrammar | None:
    """Return the pattern and grammar of an answer that is an unmarked call of one of `tools`.

    The pattern includes a tool's name, so other JSON and lists stay unconstrained.  None for a
    family without bare calls.
    """
    if family.main is not None or not tools:
        return None
    names = b"|".join(re.escape(tool.name.encode()) for tool in tools)
    text = GrammarText(is_lenient=True)
    if family.is_pythonic:
        pattern = rb"\s*(\[\s*(?:%b)\()" % names
        answer = python_list(text, tools, True)
    else:
        pattern = rb'%b(\{\s*"name"\s*:\s*"(?:%b)")' % (_BEFORE_JSON, names)
        answer = json_call(text, tools)
    if family.is_start_ambiguous:
        pattern += rb"|\s*%b(\[)" % re.escape(family.tool_call_start.encode())
        answer = f"({answer} | {call_body(family)(text, tools, True)})"
    longest = max(len(tool.name.encode()) for tool in tools)
    return BareCallGrammar(
        re.compile(pattern), text.constraint(answer, "tools"), _MAX_PREFIX_BYTES + longest
    )
