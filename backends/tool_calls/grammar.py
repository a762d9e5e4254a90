"""Builds grammars that constrain a model to tool calls in its family's format."""

import json
from collections.abc import Mapping, Sequence

from backends.grammar.compiler import GrammarText, output_rule
from backends.grammar.constraint import Constraint
from backends.grammar.schema_limits import check_enforceable
from backends.tool_calls import harmony
from backends.tool_calls.families import ToolFamily
from backends.tool_calls.grammar_forms import (
    Body,
    any_of,
    gemma,
    list_of,
    python_list,
    python_section,
    tagged,
)
from backends.tool_calls.tagged_forms import GLM, LONGCAT, MINIMAX, QWEN_CODER
from core.types import Output, Tool


def call_constraint(
    family: ToolFamily,
    tools: Sequence[Tool],
    *,
    is_bare: bool = False,
    allows_several: bool = False,
    reasoning: str | None = None,
) -> Constraint:
    """Return the grammar of an answer that is a call of one of `tools`, in the form of `family`.

    `is_bare`: without the family's outer markers.  `allows_several`: more calls may follow, if the
    form supports several in one answer.  `reasoning` is the text that ends the model's reasoning,
    which then precedes the call.
    """
    _check(tools)
    text = GrammarText()
    if family.name == "harmony":
        start = f"{text.marker(harmony.CHANNEL)} {text.quoted('commentary to=functions.')}"
        answer = f"{start} {_harmony(text, tools, False)}"
    elif is_bare:
        is_list = family.is_pythonic
        answer = python_list(text, tools, allows_several) if is_list else json_call(text, tools)
    else:
        body = call_body(family)(text, tools, allows_several)
        answer = f"{text.marker(family.tool_call_start)} {body}"
        if allows_several and (between := _SEPARATORS.get(family.name)) is not None:
            one = text.rule(answer)
            answer = f"{one} ({text.quoted(between)} {one})*" if between else f"{one}+"
    return text.constraint(answer, "tools", reasoning=reasoning)


def output_or_calls(
    family: ToolFamily,
    tools: Sequence[Tool],
    output: Output,
    *,
    is_bare: bool = False,
    allows_several: bool = True,
    reasoning: str | None = None,
) -> Constraint:
    """Return the grammar of an answer that matches `output` or is a call of one of `tools`.

    The model chooses, so calls are in free style as in `triggered_calls`.  `is_bare`: they may
    also come without the family's outer markers.  Raises RequestError.
    """
    _check(tools)
    text = GrammarText()
    answer, param = output_rule(text, output)
    text.is_lenient = True
    if family.name == "harmony":
        lead = " ".join(map(text.marker, harmony.FINAL))
        start = f"{text.marker(harmony.CHANNEL)} {text.quoted('commentary to=functions.')}"
        choices = [f"{lead} ({answer})", f"{start} {_harmony(text, tools, False)}"]
        return text.constraint(any_of(text, choices), param, reasoning=reasoning)
    call = f"{text.marker(family.tool_call_start)} {call_body(family)(text, tools, allows_several)}"
    if allows_several and family.name in _SEPARATORS:
        one = text.rule(call)
        call = f"{one} ({text.gap} {one})*"
    choices = [f"({answer})", call]
    if is_bare:
        is_list = family.is_pythonic
        choices.append(
            python_list(text, tools, allows_several) if is_list else json_call(text, tools)
        )
    return text.constraint(any_of(text, choices), param, reasoning=reasoning)


def triggered_calls(family: ToolFamily, tools: Sequence[Tool]) -> dict[str, Constraint]:
    """Return, for each text that always starts a call, the grammar of what follows it.

    Keywords that llguidance does not support are ignored.  Several calls may follow if the family
    encloses them together.
    """
    _check(tools)
    grammars: dict[str, Constraint] = {}
    if family.is_start_ambiguous:
        return grammars
    if family.name == "harmony":
        for start in ("<|channel|>commentary to=functions.", "assistant to=functions."):
            text = GrammarText(is_lenient=True)
            grammars[start] = text.constraint(_harmony(text, tools, True), "tools")
        return grammars
    text = GrammarText(is_lenient=True)
    grammars[family.tool_call_start] = text.constraint(
        call_body(family)(text, tools, True), "tools"
    )
    return grammars


def call_body(family: ToolFamily) -> Body:
    """Return the builder of the grammar of everything after the family's first marker."""
    return _BODIES.get(family.name, _json_call)


def _check(tools: Sequence[Tool]) -> None:
    for tool in tools:
        check_enforceable(dict(tool.parameters), "tools")


def _object(
    text: GrammarText,
    tools: Sequence[Tool],
    *,
    name_key: str = "name",
    arguments_key: str = "arguments",
    before: str = "",
) -> str:
    """Return the rule of a call as one JSON object with a name and its arguments."""
    choices = []
    if text.is_lenient:
        return any_of(text, [_lenient_object(text, tool, name_key, before) for tool in tools])
    for tool in tools:
        opening = f'{{{before}"{name_key}": {json.dumps(tool.name)}, "{arguments_key}": '
        choices.append(f"{text.quoted(opening)} {_arguments(text, tool)} {text.quoted('}')}")
    return any_of(text, choices)


def _lenient_object(text: GrammarText, tool: Tool, name_key: str, before: str) -> str:
    """Return a call's object as models write it: with whitespace, an optional id, either key."""
    gap = text.gap
    comma, colon = f'{gap} "," {gap}', f'{gap} ":" {gap}'
    identity = "/[A-Za-z0-9_-]{0,40}/"
    lead = f"{text.quoted(before)}? " if before else ""
    key = f"({text.quoted(json.dumps('arguments'))} | {text.quoted(json.dumps('parameters'))})"
    name = text.quoted(json.dumps(tool.name))
    behind = f'({comma} {text.quoted(json.dumps("id"))} {colon} "\\"" {identity} "\\"")?'
    return (
        f'"{{" {gap} {lead}{text.quoted(json.dumps(name_key))} {colon} {name} {comma} '
        f'{key} {colon} {_arguments(text, tool)} {behind} {gap} "}}"'
    )


def _arguments(text: GrammarText, tool: Tool) -> str:
    return text.json(dict(tool.parameters) or {"type": "object"})


def json_call(text: GrammarText, tools: Sequence[Tool]) -> str:
    """Return the rule of one call as JSON without markers."""
    return _object(text, tools, arguments_key="parameters")


def _json_call(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
    del allows_several
    gap = text.gap if text.is_lenient else text.quoted("\n")
    return f"{gap} {_object(text, tools)} {gap} {text.marker('</tool_call>')}"


def _json_list(closing: str, before: str = "") -> Body:
    def body(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
        end = f" {text.marker(closing)}" if closing else ""
        lead = f"{text.quoted(before)}? " if before else ""
        return f"{lead}{list_of(text, _object(text, tools), allows_several=allows_several)}{end}"

    return body


def _action_list(closing: str, before: str, identity: str) -> Body:
    def body(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
        one = _object(
            text, tools, name_key="tool_name", arguments_key="parameters", before=identity
        )
        lead = f"{text.quoted(before)}? " if before else ""
        gap = f" {text.quoted(before)}?" if before else ""
        return (
            f"{lead}{list_of(text, one, allows_several=allows_several)}{gap} {text.marker(closing)}"
        )

    return body


def _python_tag(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
    del allows_several
    return json_call(text, tools)


def _mistral(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
    del allows_several
    marker = text.marker("[ARGS]")
    return any_of(text, [f"{text.quoted(t.name)} {marker} {_arguments(text, t)}" for t in tools])


def _kimi(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
    begin, middle = text.marker("<|tool_call_begin|>"), text.marker("<|tool_call_argument_begin|>")
    end, last = text.marker("<|tool_call_end|>"), text.marker("<|tool_calls_section_end|>")
    names = [
        f"{text.quoted(f'functions.{tool.name}:')} /[0-9]+/ {middle} {_arguments(text, tool)}"
        for tool in tools
    ]
    one = f"{begin} {any_of(text, names)} {end}"
    return f"({one}){'+' if allows_several else ''} {last}"


def _deepseek(prefix: str, opening: str, closing: str) -> Body:
    def body(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
        begin, middle = text.marker("<｜tool▁call▁begin｜>"), text.marker("<｜tool▁sep｜>")
        end, last = text.marker("<｜tool▁call▁end｜>"), text.marker("<｜tool▁calls▁end｜>")
        before = f"{text.quoted(prefix)} {middle}" if prefix else ""
        calls = []
        for tool in tools:
            name = f"{tool.name}{opening}"
            after = "" if prefix else middle
            close = text.quoted(closing) if closing else ""
            calls.append(
                f"{before} {text.quoted(name)} {after} {_arguments(text, tool)} {close}".strip()
            )
        one = f"{begin} {any_of(text, calls)} {end}"
        more = f" ({text.quoted(chr(10))}? {one})*" if allows_several else ""
        return f"{one}{more} {last}"

    return body


def _harmony(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
    del allows_several
    message = text.marker(harmony.MESSAGE)
    gap = f'" " {text.marker(harmony.CONSTRAIN)} "json"'
    if text.is_lenient:
        channel = f'({text.marker(harmony.CHANNEL)} "commentary")?'
        gap = (
            f'{channel} (" " /[a-z]{{0,12}}/)? ({text.marker(harmony.CONSTRAIN)} /[a-z]{{0,12}}/)?'
        )
    calls = [f"{text.quoted(tool.name)} {gap} {message} {_arguments(text, tool)}" for tool in tools]
    return any_of(text, calls)


# Separators that templates write between calls if each call has its own markers.
_SEPARATORS: Mapping[str, str] = {
    "hermes": "\n",
    "qwen3_coder": "\n",
    "glm4": "\n",
    "longcat": "\n",
    "mistral": "",
    "function_gemma": "",
    "gemma4": "",
}

_BODIES: Mapping[str, Body] = {
    "hermes": _json_call,
    "llama3_json": _python_tag,
    "pythonic": python_section("<|python_end|>"),
    "lfm2": python_section("<|tool_call_end|>"),
    "mistral": _mistral,
    "mistral_json": _json_list("", " "),
    "qwen3_coder": tagged(QWEN_CODER, "\n"),
    "minimax_m2": tagged(MINIMAX, "\n"),
    "glm4": tagged(GLM, ""),
    "longcat": tagged(LONGCAT, ""),
    "kimi_k2": _kimi,
    "deepseek_v3": _deepseek("function", "\n```json\n", "\n```"),
    "deepseek_v31": _deepseek("", "", ""),
    "function_gemma": gemma("<escape>", "<end_function_call>"),
    "gemma4": gemma('<|"|>', "<tool_call|>"),
    "granite": _json_list(""),
    "phi4": _json_list(""),
    "phi4_mini": _json_list("<|/tool_call|>"),
    "cohere": _action_list("<|END_ACTION|>", "", '"tool_call_id": "0", '),
    "command_r": _action_list("```", "\n", ""),
}
