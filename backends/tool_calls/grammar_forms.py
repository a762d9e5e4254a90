"""Grammars of tool-call formats other than JSON: tags, Python syntax, Gemma's notation."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from backends.grammar.compiler import GrammarText
from backends.tool_calls.schemas import types_of
from backends.tool_calls.tagged_forms import MINIMAX, TagForm
from core.types import JsonValue, Tool

# Builds the rule for the text after a call's first marker; the flag allows several calls.
Body: TypeAlias = Callable[[GrammarText, Sequence[Tool], bool], str]


def any_of(text: GrammarText, choices: Sequence[str]) -> str:
    """Return a rule that matches one of `choices`."""
    return text.rule(" | ".join(choices))


def list_of(text: GrammarText, one: str, *, allows_several: bool) -> str:
    """Return the rule text of a JSON or Python list of calls."""
    if text.is_lenient:
        return f'"[" {text.gap} {one} ({text.gap} "," {text.gap} {one})* {text.gap} "]"'
    more = f" ({text.quoted(', ')} {one})*" if allows_several else ""
    return f"{text.quoted('[')} {one}{more} {text.quoted(']')}"


def tagged(form: TagForm, between: str) -> Body:
    """Return the rule builder of a tag format; `between` is written after each of its lines."""

    def body(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
        calls = [_tagged_call(text, form, tool, between) for tool in tools]
        one = any_of(text, calls)
        lead = text.quoted("\n") if form.name_open else ""
        if not form.end:
            return one
        count = "+" if allows_several and form is MINIMAX else ""
        return f"({lead} {one}){count} {text.quoted(chr(10))} {text.marker(form.end)}"

    return body


def _tagged_call(text: GrammarText, form: TagForm, tool: Tool, between: str) -> str:
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    parts = [text.quoted(f"{form.name_open}{tool.name}{form.name_close[0]}{between}")]
    if not form.name_open:
        parts = [text.quoted(f"{tool.name}\n")]
    for key, schema in properties.items() if isinstance(properties, dict) else ():
        is_needed = isinstance(required, list) and key in required
        one = _tagged_value(text, form, tool, key, schema)
        parts.append(one if is_needed else f"({one})?")
    parts.append(text.quoted(form.close) if form.name_open else text.marker(form.close))
    return " ".join(parts)


def _tagged_value(text: GrammarText, form: TagForm, tool: Tool, key: str, schema: JsonValue) -> str:
    pad = "\n" if form.is_padded else ""
    lead = f"{form.key_open}{key}{form.key_close}"
    lead += f"\n{form.value_open}" if form.value_open else pad
    types = types_of(schema, tool.parameters)
    values = schema.get("enum") if isinstance(schema, dict) else None
    tail = text.quoted(f"{pad}{form.value_close}\n")
    if types == {"string"}:
        if isinstance(values, list):
            value = "(" + " | ".join(text.quoted(str(one)) for one in values) + ")"
            return f"{text.quoted(lead)} {value} {tail}"
        return (
            f"{text.quoted(lead)} {text.until(f'{pad}{form.value_close}')} {text.quoted(chr(10))}"
        )
    inner = dict(schema) if isinstance(schema, dict) else {}
    for name in ("$defs", "definitions"):
        if name in tool.parameters:
            inner.setdefault(name, tool.parameters[name])
    return f"{text.quoted(lead)} {text.json(inner)} {tail}"


def python_list(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
    """Return the rule text of a list of calls in Python syntax."""
    one = any_of(text, [_python_call(text, tool) for tool in tools])
    return list_of(text, one, allows_several=allows_several)


def _python_call(text: GrammarText, tool: Tool) -> str:
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    entries = list(properties.items()) if isinstance(properties, dict) else []
    needed = [e for e in entries if isinstance(required, list) and e[0] in required]
    optional = [e for e in entries if e not in needed]
    # Required ones come first, so every optional one has a comma before it.
    parts = [_python_argument(text, tool, key, schema) for key, schema in needed]
    joined = f" {text.quoted(', ')} ".join(parts)
    for index, (key, schema) in enumerate(optional):
        one = _python_argument(text, tool, key, schema)
        if needed:
            joined += f" ({text.quoted(', ')} {one})?"
        elif not index:
            rest = [_python_argument(text, tool, *entry) for entry in optional[1:]]
            tail = " ".join(f"({text.quoted(', ')} {each})?" for each in rest)
            joined = f"({one} {tail})?"
    return f"{text.quoted(tool.name + '(')} {joined} {text.quoted(')')}"


def _python_argument(text: GrammarText, tool: Tool, key: str, schema: JsonValue) -> str:
    inner = dict(schema) if isinstance(schema, dict) else {}
    for name in ("$defs", "definitions"):
        if name in tool.parameters:
            inner.setdefault(name, tool.parameters[name])
    return f"{text.quoted(key + '=')} {text.json(inner, is_python=True)}"


def python_section(closing: str) -> Body:
    """Return the rule builder of a Python list and its closing marker."""

    def body(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
        return f"{python_list(text, tools, allows_several)} {text.marker(closing)}"

    return body


def gemma(quote: str, end: str) -> Body:
    """Return the rule builder of a call in Gemma's notation, `call:name{key:value, …}`."""

    def body(text: GrammarText, tools: Sequence[Tool], allows_several: bool) -> str:
        del allows_several
        calls = []
        for tool in tools:
            value = _gemma_object(text, quote, tool.parameters, tool)
            calls.append(f"{text.quoted(f'call:{tool.name}')} {value}")
        return f"{any_of(text, calls)} {text.marker(end)}"

    return body


def _gemma_object(
    text: GrammarText, quote: str, schema: Mapping[str, JsonValue], tool: Tool
) -> str:
    properties = schema.get("properties")
    required = schema.get("required")
    entries = list(properties.items()) if isinstance(properties, dict) else []
    needed = [e for e in entries if isinstance(required, list) and e[0] in required]
    optional = [e for e in entries if e not in needed]
    comma = text.quoted(",")
    members = [
        f"{text.quoted(key + ':')} {_gemma_value(text, quote, one, tool)}"
        for key, one in (*needed, *optional)
    ]
    joined = f" {comma} ".join(members[: len(needed)])
    left = members[len(needed) :]
    if needed:
        joined += "".join(f" ({comma} {one})?" for one in left)
    elif left:
        joined = f"({left[0]} {' '.join(f'({comma} {one})?' for one in left[1:])})?"
    return f"{text.quoted('{')} {joined} {text.quoted('}')}"


def _gemma_value(text: GrammarText, quote: str, schema: JsonValue, tool: Tool) -> str:
    types = types_of(schema, tool.parameters)
    if types == {"string"}:
        values = schema.get("enum") if isinstance(schema, dict) else None
        if isinstance(values, list):
            delimiter = text.marker(quote)
            inner = " | ".join(text.quoted(str(one)) for one in values)
            return f"{delimiter} ({inner}) {delimiter}"
        return f"{text.marker(quote)} {text.until(quote)}"
    if types <= {"integer", "number", "boolean", "null"} and types:
        return text.json(dict(schema) if isinstance(schema, dict) else {})
    if types == {"object"} and isinstance(schema, dict) and schema.get("properties"):
        return _gemma_object(text, quote, schema, tool)
    if types == {"array"} and isinstance(schema, dict):
        item = text.rule(_gemma_value(text, quote, schema.get("items"), tool))
        return f'"[" ({item} ("," {item})*)? "]"'
    return _gemma_any(text, quote)


def _gemma_any(text: GrammarText, quote: str) -> str:
    """Return a rule that matches any value in Gemma's notation."""
    name = text.reserve()
    scalar = text.json({"type": ["number", "boolean", "null"]})
    word = "/[A-Za-z_][A-Za-z0-9_]*/"
    text.define(
        name,
        f"{text.marker(quote)} {text.until(quote)} | {scalar} | "
        f'"[" ({name} ("," {name})*)? "]" | '
        f'"{{" ({word} ":" {name} ("," {word} ":" {name})*)? "}}"',
    )
    return name
