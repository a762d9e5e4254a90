"""Translates the templates of Ollama's models, in Go's text/template, into Jinja chat templates.

A template with `.Messages` renders a whole conversation.  An older one renders one turn from
`.System`, `.Prompt` and `.Response`, and is repeated for each; what comes after `.Response` is left
out of the last one.  Source: Go's text/template/parse, Ollama's template/template.go and docs.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

_LONGEST = 64 * 1024
_DEEPEST = 50
_ACTION = re.compile(
    r"""\{\{(-(?=\s))?\s*(/\*.*?\*/|(?:"(?:\\.|[^"\\\n])*"|`[^`]*`|[^"`])*?)\s*((?<=\s)-)?\}\}""",
    re.DOTALL,
)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\\n])*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)"""
    r"""|(?P<path>\$?\w*(?:\.[A-Za-z_]\w*)+|\$\w*|\.)|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<mark>:=|[()|=,]))"""
)
# Fields of messages, calls and tools, by their names in chat templates.
_FIELDS = {
    "Role": "role", "Content": "content", "Thinking": "reasoning_content",
    "ToolCalls": "tool_calls",
    "ToolName": "name", "ToolCallID": "tool_call_id", "ID": "id", "Type": "type", "Name": "name",
    "Function": "function", "Arguments": "arguments", "Description": "description",
    "Parameters": "parameters", "Properties": "properties", "Required": "required",
}  # fmt: skip
_SYSTEM = "messages|selectattr('role', 'equalto', 'system')|map(attribute='content')|join('\\n\\n')"
_ROOT = {
    "Messages": "messages", "Tools": "tools", "System": f"({_SYSTEM})", "Response": "''",
    "Prompt": "''", "Suffix": "''", "Query": "''", "Document": "''", "Instruction": "''",
    "Think": "(enable_thinking|default(true))", "IsThinkSet": "(enable_thinking is defined)",
}  # fmt: skip
_TURN = {
    **_ROOT, "System": "system", "Prompt": "prompt", "Response": "response", "Messages": "[]",
    "Tools": "[]",
}  # fmt: skip
# Go writes these as JSON.
_STRUCTURED = ("tools", "'tool_calls']", "'function']", "'arguments']", "'parameters']",
               "'properties']", "'required']")  # fmt: skip
_LISTS = ("messages", "tools", "'tool_calls']")
_COMPARISONS = {"ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_JOINED = {"and": " and ", "or": " or "}


class _Untranslatable(Exception):
    """The template has what Jinja, or this module, has no equivalent of."""


@dataclass(slots=True)
class _Node:
    """A text, an action that is printed or assigns, or a branch (`if`, `range`, `with`)."""

    kind: str
    text: str
    body: list["_Node"] = field(default_factory=list)
    other: list["_Node"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Scope:
    """What names mean at a place: `dot` is a Jinja expression, None for the root."""

    root: Mapping[str, str]
    dot: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    is_loop: bool = False


@lru_cache(maxsize=512)
def to_jinja(template: str) -> str | None:
    """Return the Jinja chat template that renders the same; None if it has no equivalent.

    Takes milliseconds the first time.  The result has literals and expressions of this module
    alone, so that no text of the template is read as Jinja.
    """
    if len(template) > _LONGEST:
        return None
    try:
        nodes = _parse(template.replace("\r\n", "\n"))
        if _mentions(nodes, "Messages"):
            return _Writer(_ROOT).written(nodes)
        if not _mentions(nodes, "Response"):
            nodes.append(_Node("action", ".Response"))
        if not _mentions(nodes, "Prompt"):
            return None
        return _by_turns(nodes)
    except (_Untranslatable, RecursionError):
        return None


def _by_turns(nodes: list[_Node]) -> str:
    turn, last = _Writer(_TURN).written(nodes), _Writer(_TURN).written(_until_response(nodes)[0])
    names = "(system, prompt, response)"
    render = "{{ turn(s.system, s.prompt, s.response) }}"
    clear = "".join(f"{{% set s.{name} = '' %}}" for name in ("system", "prompt", "response"))
    # Messages of one role in a row are one message.
    add = "{{% set s.{0} = (s.{0} + '\\n\\n' if s.{0} else '') + m['content'] %}}"
    return (
        f"{{% macro turn{names} %}}{turn}{{% endmacro %}}"
        f"{{% macro last{names} %}}{last}{{% endmacro %}}"
        "{% set s = namespace(system='', prompt='', response='') %}"
        "{% for m in messages %}"
        f"{{% if m['role'] == 'system' %}}{{% if s.prompt or s.response %}}{render}{clear}"
        f"{{% endif %}}{add.format('system')}"
        f"{{% elif m['role'] == 'user' %}}{{% if s.response %}}{render}{clear}{{% endif %}}"
        f"{add.format('prompt')}"
        f"{{% elif m['role'] == 'assistant' %}}{add.format('response')}{{% endif %}}"
        "{% endfor %}"
        "{{ last(s.system, s.prompt, s.response) }}"
    )


def _until_response(nodes: Sequence[_Node]) -> tuple[list[_Node], bool]:
    """Return the nodes up to the first that prints the answer, and whether there is one."""
    kept: list[_Node] = []
    for node in nodes:
        if node.kind == "action" and re.search(r"\.Response\b", node.text):
            return [*kept, node], True
        body, is_cut = _until_response(node.body)
        other: list[_Node] = []
        if not is_cut:
            other, is_cut = _until_response(node.other)
        kept.append(_Node(node.kind, node.text, body, other))
        if is_cut:
            return kept, True
    return kept, False


def _mentions(nodes: Sequence[_Node], name: str) -> bool:
    wanted = re.compile(rf"\.{name}\b")
    return any(
        (node.kind != "text" and wanted.search(node.text))
        or _mentions(node.body, name)
        or _mentions(node.other, name)
        for node in nodes
    )


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """Yield texts and actions, with the blanks removed that the actions trim."""
    start, trims = 0, False
    for match in _ACTION.finditer(template):
        text = template[start : match.start()]
        text = text.lstrip() if trims else text
        yield "text", text.rstrip() if match[1] else text
        if not match[2].startswith("/*"):
            yield "action", match[2].strip()
        start, trims = match.end(), bool(match[3])
    rest = template[start:]
    if "{{" in rest:
        raise _Untranslatable
    yield "text", rest.lstrip() if trims else rest


class _Tree:
    """Builds the nodes of a template from its texts and actions, in order."""

    def __init__(self) -> None:
        self._root = _Node("root", "")
        # Each open branch: the list that takes nodes now, the branch, how many one `end` closes.
        self._open: list[tuple[list[_Node], _Node, int]] = [(self._root.body, self._root, 0)]

    def finished(self) -> list[_Node]:
        """Return the nodes.  Raises _Untranslatable if a branch has no end."""
        if len(self._open) > 1:
            raise _Untranslatable
        return self._root.body

    def add(self, kind: str, text: str) -> None:
        """Add a text or an action.  Raises _Untranslatable."""
        nodes = self._open[-1][0]
        word, _, rest = text.partition(" ")
        if kind == "text":
            nodes += [_Node("text", text)] if text else []
        elif word in ("if", "range", "with"):
            self._begin(nodes, word, rest, 1)
        elif word == "else":
            self._switch(rest.strip())
        elif word == "end":
            self._end()
        elif word in ("break", "continue"):
            nodes.append(_Node(word, ""))
        elif word in ("define", "template", "block", ""):
            raise _Untranslatable
        else:
            nodes.append(_Node("action", text))

    def _begin(self, nodes: list[_Node], kind: str, condition: str, ends: int) -> None:
        node = _Node(kind, condition)
        nodes.append(node)
        self._open.append((node.body, node, ends))
        if len(self._open) > _DEEPEST:
            raise _Untranslatable

    def _switch(self, rest: str) -> None:
        """Go on in the other part of a branch; `rest` is that of `else if …`."""
        nodes, branch, ends = self._open[-1]
        kind, _, condition = rest.partition(" ")
        if branch is self._root or nodes is branch.other or kind not in ("", "if", "with"):
            raise _Untranslatable
        self._open[-1] = (branch.other, branch, ends)
        if kind:
            self._begin(branch.other, kind, condition, ends + 1)

    def _end(self) -> None:
        if len(self._open) < 2:
            raise _Untranslatable
        del self._open[-self._open[-1][2] :]


def _parse(template: str) -> list[_Node]:
    """Return the template's nodes.  Raises _Untranslatable."""
    tree = _Tree()
    for kind, text in _pieces(template):
        tree.add(kind, text)
    return tree.finished()


class _Writer:
    """Writes nodes as Jinja; variables are in a namespace, because loops may assign to them."""

    def __init__(self, root: Mapping[str, str]) -> None:
        self._root = root
        self._count = 0

    def written(self, nodes: Sequence[_Node]) -> str:
        """Return the Jinja source."""
        return "{% set v = namespace() %}" + self._nodes(nodes, _Scope(self._root))

    def _nodes(self, nodes: Sequence[_Node], scope: _Scope) -> str:
        written = []
        for node in nodes:
            text, scope = self._node(node, scope)
            written.append(text)
        return "".join(written)

    def _node(self, node: _Node, scope: _Scope) -> tuple[str, _Scope]:
        match node.kind:
            case "text":
                return f"{{{{ {node.text!a} }}}}", scope
            case "break" | "continue" if scope.is_loop:
                return f"{{% {node.kind} %}}", scope
            case "action":
                return self._action(node.text, scope)
            case "if":
                condition = _expression(node.text, scope)
                body, other = self._nodes(node.body, scope), self._nodes(node.other, scope)
                return f"{{% if {condition} %}}{body}{_else(other)}{{% endif %}}", scope
            case "with":
                return self._with(node, scope), scope
            case "range":
                return self._range(node, scope), scope
            case _:
                raise _Untranslatable

    def _action(self, text: str, scope: _Scope) -> tuple[str, _Scope]:
        match = re.fullmatch(r"\$(\w+)\s*(:?=)\s*(.*)", text, re.DOTALL)
        if match is None:
            value = _expression(text, scope)
            is_tool = value == scope.dot and value.startswith("tool_")
            if is_tool or value.endswith(_STRUCTURED):
                value = f"({value})|tojson"
            return f"{{{{ {value} }}}}", scope
        name, value = match[1], _expression(match[3], scope)
        if match[2] == ":=":
            scope = self._declared(name, scope)
        if name not in scope.variables:
            raise _Untranslatable
        return f"{{% set {scope.variables[name]} = {value} %}}", scope

    def _declared(self, name: str, scope: _Scope) -> _Scope:
        self._count += 1
        variables = {**scope.variables, name: f"v.{name}_{self._count}"}
        return replace(scope, variables=variables)

    def _with(self, node: _Node, scope: _Scope) -> str:
        self._count += 1
        name = f"v.with_{self._count}"
        body = self._nodes(node.body, replace(scope, dot=name))
        other = self._nodes(node.other, scope)
        value = _expression(node.text, scope)
        return f"{{% set {name} = {value} %}}{{% if {name} %}}{body}{_else(other)}{{% endif %}}"

    def _range(self, node: _Node, scope: _Scope) -> str:
        match = re.fullmatch(r"(?:\$(\w+)\s*,\s*)?(?:\$(\w+)\s*:=\s*)?(.*)", node.text, re.DOTALL)
        if match is None or (match[1] and not match[2]):
            raise _Untranslatable
        values = _expression(match[3], scope)
        if not values.endswith(_LISTS):
            # Go's order and meaning of maps are others.
            raise _Untranslatable
        self._count += 1
        kind = "tool" if values == "tools" else "item"
        item, start = f"{kind}_{self._count}", ""
        inner = replace(scope, dot=item, is_loop=True)
        for name, value in ((match[1], "loop.index0"), (match[2], item)):
            if name and name != "_":
                inner = self._declared(name, inner)
                start += f"{{% set {inner.variables[name]} = {value} %}}"
        body, other = self._nodes(node.body, inner), self._nodes(node.other, scope)
        return f"{{% for {item} in {values} or [] %}}{start}{body}{_else(other)}{{% endfor %}}"


def _else(other: str) -> str:
    return f"{{% else %}}{other}" if other else ""


def _expression(text: str, scope: _Scope) -> str:
    """Return a pipeline as a Jinja expression.  Raises _Untranslatable."""
    tokens: list[tuple[str, str]] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise _Untranslatable
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    value, rest = _pipeline(tokens, scope)
    if rest:
        raise _Untranslatable
    return value


_Tokens = Sequence[tuple[str, str]]


def _pipeline(tokens: _Tokens, scope: _Scope) -> tuple[str, _Tokens]:
    value, tokens = _command(tokens, scope, ())
    while tokens and tokens[0] == ("mark", "|"):
        # What comes before is the last argument of what comes after.
        value, tokens = _command(tokens[1:], scope, (value,))
    return value, tokens


def _command(tokens: _Tokens, scope: _Scope, piped: tuple[str, ...]) -> tuple[str, _Tokens]:
    """Return a call of a function, or a single operand, and the tokens after it."""
    if not tokens:
        raise _Untranslatable
    kind, name = tokens[0]
    is_call = kind == "word" and name not in ("true", "false", "nil")
    arguments: list[str] = []
    tokens = tokens[1:] if is_call else tokens
    while tokens and tokens[0] not in (("mark", "|"), ("mark", ")")):
        value, tokens = _operand(tokens, scope)
        arguments.append(value)
    if is_call:
        return _call(name, [*arguments, *piped]), tokens
    if len(arguments) != 1 or piped:
        raise _Untranslatable
    return arguments[0], tokens


def _operand(tokens: _Tokens, scope: _Scope) -> tuple[str, _Tokens]:
    (kind, text), rest = tokens[0], tokens[1:]
    match kind:
        case "string":
            return ascii(_string(text)), rest
        case "number":
            return text, rest
        case "path":
            return _path(text, scope), rest
        case "word":
            known = {"true": "true", "false": "false", "nil": "none"}
            if text not in known:
                raise _Untranslatable
            return known[text], rest
    if text != "(":
        raise _Untranslatable
    value, rest = _pipeline(rest, scope)
    if not rest or rest[0] != ("mark", ")"):
        raise _Untranslatable
    return f"({value})", rest[1:]


def _string(text: str) -> str:
    """Return a Go string's value; its escapes are Python's."""
    if text.startswith("`"):
        return text[1:-1]
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError) as problem:
        raise _Untranslatable from problem


def _path(text: str, scope: _Scope) -> str:
    """Return the expression for `.A.B`, `$.A.B` or `$x.A`."""
    first, *names = text.split(".")
    if text in (".", "$"):
        names = []
    value = scope.dot
    if first.startswith("$"):
        value = None
        if first != "$":
            if first[1:] not in scope.variables:
                raise _Untranslatable
            value = scope.variables[first[1:]]
    elif first:
        raise _Untranslatable
    if value is None:
        if not names or names[0] not in scope.root:
            raise _Untranslatable
        value, names = scope.root[names[0]], names[1:]
    for name in names:
        if name not in _FIELDS:
            raise _Untranslatable
        value += f"['{_FIELDS[name]}']"
    return value


def _call(name: str, arguments: Sequence[str]) -> str:
    """Return the call of one of Go's functions, or of Ollama's `json`."""
    count = len(arguments)
    if name in _JOINED and count >= 1:
        return f"({_JOINED[name].join(arguments)})"
    if name == "eq" and count >= 2:
        first, *others = arguments
        return "(" + " or ".join(f"{first} == {other}" for other in others) + ")"
    if name in _COMPARISONS and count == 2:
        return f"({arguments[0]} {_COMPARISONS[name]} {arguments[1]})"
    if name == "slice" and 1 <= count <= 3:
        start, end = [*arguments[1:], "", ""][:2]
        return f"({arguments[0]}[{start}:{end}])"
    if name == "index" and count == 2:
        return f"({arguments[0]}[{arguments[1]}])"
    one = {"not": "(not {})", "len": "({}|length)", "json": "({}|tojson)", "print": "({})"}
    if name in one and count == 1:
        return one[name].format(arguments[0])
    raise _Untranslatable
