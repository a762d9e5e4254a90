"""Edits JSON text in place: only changed values and new members are rewritten.

Understands JSON with comments and trailing commas, as VS Code, Zed and opencode write it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from router.clients.problems import ConnectError

_DEEPEST = 100
_GAP = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_PLAIN = re.compile(r"-?\d[\d.eE+-]*|true|false|null")
_REST_OF_LINE = re.compile(r"[ \t]*(?://[^\n]*|/\*[^\n]*?\*/[ \t]*)?(?=\r?\n)")

# Start and end of the replaced text, and the new text.
Replacement: TypeAlias = tuple[int, int, str]


@dataclass(slots=True)
class Node:
    """A value, and where it stands in the text: `end` is exclusive.

    `parts` has a container's values in order, `keys` an object's keys; `comma` is the end of a
    trailing comma after the last of them, 0 if there is none.
    """

    value: Any
    start: int
    end: int
    keys: list[str] = field(default_factory=list)
    parts: list["Node"] = field(default_factory=list)
    comma: int = 0


def parse(text: str) -> Node:
    """Return the one value of `text`.  Raises ConnectError naming line and problem."""
    node = _value(text, _gap(text, 0), 0)
    end = _gap(text, node.end)
    if end != len(text):
        raise _problem(text, end, "more text after the value")
    return node


def edited(text: str, node: Node, wanted: Any) -> str:
    """Return `text` with the value of `node`, its root, changed to `wanted`.

    Raises ConnectError if that would remove an entry or a comment.
    """
    found: list[Replacement] = []
    _compare(text, node, wanted, found)
    pieces, done = [], 0
    for start, end, new in sorted(found, key=lambda replacement: replacement[0]):
        pieces += [text[done:start], new]
        done = end
    result = "".join(pieces) + text[done:]
    if parse(result).value != wanted:
        raise ConnectError("rewriting it would change its meaning; edit it by hand")
    return result


def indent_of(text: str) -> str:
    """Return the white space of one level of indentation in `text`."""
    for line in text.splitlines()[1:]:
        space = line[: len(line) - len(line.lstrip())]
        if space and line.strip() and not line.lstrip().startswith(("*", "//")):
            return "\t" if space.startswith("\t") else space
    return "  "


def _value(text: str, at: int, depth: int) -> Node:
    if depth > _DEEPEST:
        raise _problem(text, at, f"more than {_DEEPEST} levels")
    if text[at : at + 1] in ("{", "["):
        return _container(text, at, depth)
    token = _STRING.match(text, at) or _PLAIN.match(text, at)
    if token is None:
        raise _problem(text, at, "no value where one is needed")
    try:
        return Node(json.loads(token[0]), at, token.end())
    except ValueError:
        raise _problem(text, at, f"{token[0][:40]} is not a valid value") from None


def _container(text: str, start: int, depth: int) -> Node:
    is_object = text[start] == "{"
    closing = "}" if is_object else "]"
    node = Node({} if is_object else [], start, start)
    at = _gap(text, start + 1)
    while text[at : at + 1] != closing:
        if node.parts and not node.comma:
            raise _problem(text, at, f"a comma or {closing} is missing")
        if is_object:
            at = _key(text, at, node)
        part = _value(text, at, depth + 1)
        node.parts.append(part)
        at = _gap(text, part.end)
        node.comma = 0
        if text[at : at + 1] == ",":
            node.comma = at + 1
            at = _gap(text, at + 1)
    node.end = at + 1
    values = [part.value for part in node.parts]
    node.value = dict(zip(node.keys, values, strict=True)) if is_object else values
    return node


def _key(text: str, at: int, node: Node) -> int:
    token = _STRING.match(text, at)
    if token is None:
        raise _problem(text, at, "a key in double quotes is missing")
    key = json.loads(token[0])
    if key in node.keys:
        raise _problem(text, at, f"the key {key[:40]!r} appears twice")
    node.keys.append(key)
    at = _gap(text, token.end())
    if text[at : at + 1] != ":":
        raise _problem(text, at, "a colon is missing")
    return _gap(text, at + 1)


def _gap(text: str, at: int) -> int:
    found = _GAP.match(text, at)
    return found.end() if found else at


def _problem(text: str, at: int, reason: str) -> ConnectError:
    line = text.count("\n", 0, at) + 1
    return ConnectError(f"it is not valid JSON ({reason}, line {line}); correct it first")


def _compare(text: str, node: Node, wanted: Any, found: list[Replacement]) -> None:
    """Append the replacements that change the value of `node` to `wanted`."""
    if isinstance(node.value, dict) and isinstance(wanted, dict):
        if missing := [key for key in node.keys if key not in wanted]:
            raise ConnectError(f"its entry {missing[0]!r} would have to be removed by hand")
        for key, part in zip(node.keys, node.parts, strict=True):
            _compare(text, part, wanted[key], found)
        new = {key: value for key, value in wanted.items() if key not in node.value}
        found += _added(text, node, [(f"{_dumped(key)}: ", value) for key, value in new.items()])
    elif isinstance(node.value, list) and isinstance(wanted, list):
        if len(wanted) < len(node.parts):
            raise ConnectError("an entry of a list would have to be removed by hand")
        for part, value in zip(node.parts, wanted, strict=False):
            _compare(text, part, value, found)
        found += _added(text, node, [("", value) for value in wanted[len(node.parts) :]])
    elif type(node.value) is not type(wanted) or node.value != wanted:
        if node.parts:
            raise ConnectError("one of its sections has an unexpected form; edit it by hand")
        new_text = _indented(text, wanted, _line_indent(text, node.start))
        found.append((node.start, node.end, new_text))


def _added(text: str, node: Node, new: Sequence[tuple[str, Any]]) -> list[Replacement]:
    """Return the replacements that append `new`, prefixes with values, to a container."""
    if not new:
        return []
    outer = _line_indent(text, node.start)
    if not node.parts:
        inner = outer + indent_of(text)
        lines = [f"{inner}{prefix}{_indented(text, value, inner)}" for prefix, value in new]
        at = len(text[: node.end - 1].rstrip())
        return [(at, node.end - 1, "\n" + ",\n".join(lines) + f"\n{outer}")]
    last = node.parts[-1]
    at = node.comma or last.end
    found = [] if node.comma else [(last.end, last.end, ",")]
    end = "," if node.comma else ""
    if "\n" not in text[node.start : node.parts[0].start] and "\n" not in text[at : node.end]:
        flat = ", ".join(f"{prefix}{_dumped(value)}" for prefix, value in new)
        return [*found, (at, at, f" {flat}{end}")]
    inner = _line_indent(text, node.parts[-1].start)
    lines = [f"{inner}{prefix}{_indented(text, value, inner)}" for prefix, value in new]
    rest = _REST_OF_LINE.match(text, at)
    at = rest.end() if rest else at
    return [*found, (at, at, "\n" + ",\n".join(lines) + end)]


def _line_indent(text: str, at: int) -> str:
    start = text.rfind("\n", 0, at) + 1
    line = text[start:at]
    return line[: len(line) - len(line.lstrip())]


def _indented(text: str, value: Any, indent: str) -> str:
    dumped = json.dumps(value, indent=indent_of(text), ensure_ascii=False)
    return dumped.replace("\n", f"\n{indent}")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
