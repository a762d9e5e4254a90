"""Reads grammars that users send, GBNF or Lark, as rules of llguidance's Lark dialect.

Sources: llama.cpp, "GBNF Guide"; llguidance, "Syntax of LLGuidance Grammars".
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from core.errors import RequestError

_MAX_DEPTH = 50
_MAX_REPETITIONS = 10_000
_RULE = re.compile(r"(?m)^[ \t]*([A-Za-z0-9_-]+)[ \t]*::=")
_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_HEAD = re.compile(r"([A-Za-z0-9_-]+)[ \t\r\n]*::=")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_COUNT = re.compile(r"\{\s*(\d{0,9})\s*(?:(,)\s*(\d{0,9})\s*)?\}")
_CODE = re.compile(r"x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}
_TOKENS = re.compile(
    r'(?P<kept>"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n])+/)|'
    r"(?P<name>[A-Za-z_][A-Za-z0-9_-]*)"
)
_OWN_NAME = re.compile(r"start|answer|(?:rule|marker|until)\d+")
_OPTIONS = re.compile(r"(?m)^[ \t]*%llguidance[^\n]*$")


def grammar_rules(text: str, param: str, define: Callable[[str, str], str]) -> tuple[str, str]:
    """Return the name of the rule that `text` starts with, and lines to add as they are.

    `text` is GBNF if it has a rule with `::=`, else Lark.  `define` adds a rule or, if its name
    starts with a capital letter, a terminal, and returns its name; only GBNF calls it.  Raises
    RequestError for GBNF that is not valid; Lark is checked when it is compiled.
    """
    if _RULE.search(text):
        return _Emitter(_Reader(text, param).rules(), param, define).start(), ""
    lines = _TOKENS.sub(_renamed, _OPTIONS.sub("", text))
    if not re.search(r"(?m)^\s*\??user_start\b", lines):
        raise RequestError(
            f"{param}: the grammar has no rule named root (GBNF, `root ::= …`) or start (Lark, "
            "`start: …`); add one.",
            param=param,
        )
    return "user_start", lines


def _renamed(found: re.Match[str]) -> str:
    """Rename a rule of the user's whose name the server's own rules have."""
    name = found["name"]
    return f"user_{name}" if name is not None and _OWN_NAME.fullmatch(name) else found[0]


def quoted(text: str) -> str:
    """Return `text` as a quoted literal of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True, slots=True)
class _Literal:
    """A quoted text or a regex in slashes, as Lark writes it."""

    lark: str


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: "tuple[_Node, ...]"


@dataclass(frozen=True, slots=True)
class _Choice:
    options: "tuple[_Node, ...]"


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: "_Node"
    count: str


_Node = _Literal | _Reference | _Sequence | _Choice | _Repeat


class _Reader:
    """Parses GBNF; blanks, line ends and comments only separate."""

    def __init__(self, text: str, param: str) -> None:
        self._text = text
        self._param = param
        self._at = 0

    def rules(self) -> dict[str, _Node]:
        rules: dict[str, _Node] = {}
        self._skip()
        while self._at < len(self._text):
            head = _HEAD.match(self._text, self._at)
            if head is None:
                self._refuse("a rule, as in `name ::= …`, was expected")
            if head[1] in rules:
                self._refuse(f"the rule {head[1][:50]!r} is defined twice")
            self._at = head.end()
            rules[head[1]] = self._choice(0)
        return rules

    def _refuse(self, problem: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise RequestError(
            f"{self._param}: the grammar is not valid GBNF: line {line}: {problem}.",
            param=self._param,
        )

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found is not None else self._at

    def _accept(self, symbol: str) -> bool:
        self._skip()
        is_next = self._text.startswith(symbol, self._at)
        self._at += len(symbol) if is_next else 0
        return is_next

    def _choice(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            self._refuse(f"parentheses are nested deeper than {_MAX_DEPTH} levels")
        options = [self._sequence(depth)]
        while self._accept("|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while (part := self._part(depth)) is not None:
            parts.append(self._repeated(part))
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def _part(self, depth: int) -> _Node | None:
        self._skip()
        symbol = self._text[self._at : self._at + 1]
        if symbol in ("", "|", ")") or _HEAD.match(self._text, self._at):
            if symbol == ")" and not depth:
                self._refuse("a parenthesis is closed that was not opened")
            return None
        if symbol in ('"', "[", "(", "."):
            self._at += 1
        match symbol:
            case '"':
                return self._literal()
            case "[":
                return self._class()
            case ".":
                return _Literal("/(?s:.)/")
            case "(":
                inner = self._choice(depth + 1)
                if not self._accept(")"):
                    self._refuse("a parenthesis is not closed")
                return inner
        name = _NAME.match(self._text, self._at)
        if name is None:
            self._refuse(f"{symbol!r} is not supported here")
        self._at = name.end()
        return _Reference(name[0])

    def _repeated(self, part: _Node) -> _Node:
        while True:
            self._skip()
            symbol = self._text[self._at : self._at + 1]
            if symbol in ("*", "+", "?") and symbol:
                self._at += 1
                part = _Repeat(part, symbol)
            elif symbol == "{":
                part = _Repeat(part, self._count())
            else:
                return part

    def _count(self) -> str:
        found = _COUNT.match(self._text, self._at)
        if found is None or not (found[1] or found[3]):
            self._refuse("a repetition must be {m}, {m,}, {,n} or {m,n}")
        least = int(found[1] or 0)
        most = least if found[2] is None else int(found[3]) if found[3] else None
        if max(least, most or 0) > _MAX_REPETITIONS or (most is not None and most < least):
            self._refuse(f"a repetition must go up, to at most {_MAX_REPETITIONS}")
        self._at = found.end()
        return f"{{{least},{'' if most is None else most}}}"

    def _character(self) -> str:
        """Read one character of a text or class, escaped or not."""
        character = self._text[self._at : self._at + 1]
        self._at += 1
        if character != "\\":
            if not character:
                self._refuse("a text or character class is not closed")
            return character
        code = _CODE.match(self._text, self._at)
        if code is not None:
            self._at = code.end()
            number = int(code[0][1:], 16)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                self._refuse(f"\\{code[0]} is not a character")
            return chr(number)
        escaped = self._text[self._at : self._at + 1]
        if not escaped or (escaped.isalnum() and escaped not in _LETTERS):
            self._refuse(f"\\{escaped} is not an escape")
        self._at += 1
        return _LETTERS.get(escaped, escaped)

    def _literal(self) -> _Node:
        characters = []
        while self._text[self._at : self._at + 1] != '"':
            characters.append(self._character())
        self._at += 1
        return _Literal(quoted("".join(characters)))

    def _class(self) -> _Node:
        is_negated = self._text.startswith("^", self._at)
        self._at += is_negated
        ranges = []
        while self._text[self._at : self._at + 1] != "]":
            first = last = self._character()
            if self._text.startswith("-", self._at) and self._text[self._at + 1 :][:1] != "]":
                self._at += 1
                last = self._character()
                if last < first:
                    self._refuse("a range of characters must go up")
            ranges.append(_in_class(first) + (f"-{_in_class(last)}" if last != first else ""))
        self._at += 1
        if not ranges:
            self._refuse("a character class is empty")
        return _Literal(f"/[{'^' if is_negated else ''}{''.join(ranges)}]/")


def _in_class(character: str) -> str:
    is_plain = character.isalnum() or character > "\xa0"
    return character if is_plain else f"\\x{ord(character):02x}"


def _references(node: _Node) -> set[str]:
    found: set[str] = set()
    left = [node]
    while left:
        match left.pop():
            case _Reference(name):
                found.add(name)
            case _Sequence(parts) | _Choice(parts):
                left += parts
            case _Repeat(part):
                left.append(part)
    return found


class _Emitter:
    """Writes rules in Lark; whatever does not recurse becomes a terminal, which is fast."""

    def __init__(
        self, rules: dict[str, _Node], param: str, define: Callable[[str, str], str]
    ) -> None:
        self._rules = rules
        self._param = param
        self._define = define
        self._terminals = self._find_terminals()
        self._extra = 0
        self._names = {
            name: f"{'GBNF' if name in self._terminals else 'gbnf'}_{index}"
            for index, name in enumerate(rules)
        }

    def start(self) -> str:
        """Define all rules; return the name of the root."""
        for name, node in self._rules.items():
            is_terminal = name in self._terminals
            self._define(self._names[name], self._lark(node, is_terminal=is_terminal))
        return self._names["root"]

    def _find_terminals(self) -> set[str]:
        needs = {name: _references(node) for name, node in self._rules.items()}
        users: dict[str, list[str]] = {}
        for name, used in needs.items():
            for each in used:
                users.setdefault(each, []).append(name)
        missing = sorted(({"root"} | users.keys()) - needs.keys())
        if missing:
            raise RequestError(
                f"{self._param}: the grammar is not valid GBNF: the rule {missing[0][:50]!r} is "
                "not defined.",
                param=self._param,
            )
        counts = {name: len(used) for name, used in needs.items()}
        ready = [name for name, count in counts.items() if not count]
        terminals: set[str] = set()
        while ready:
            name = ready.pop()
            terminals.add(name)
            for user in users.get(name, ()):
                counts[user] -= 1
                if not counts[user]:
                    ready.append(user)
        return terminals

    def _is_terminal(self, node: _Node) -> bool:
        return _references(node) <= self._terminals

    def _lark(self, node: _Node, *, is_terminal: bool) -> str:
        match node:
            case _Literal(lark):
                return lark
            case _Reference(name):
                return self._names[name]
            case _Choice(options):
                parts = [self._lark(each, is_terminal=is_terminal) for each in options]
                return f"({' | '.join(parts)})"
            case _Repeat(part, count):
                text = f"({self._lark(part, is_terminal=is_terminal)}){count}"
                is_mixed = is_terminal or not self._is_terminal(part)
                return text if is_mixed else self._terminal(text)
            case _Sequence(parts):
                return self._sequence(parts, is_terminal=is_terminal)

    def _sequence(self, parts: tuple[_Node, ...], *, is_terminal: bool) -> str:
        """Write a sequence; in a rule, neighbours without recursion become one terminal."""
        if is_terminal:
            return " ".join(self._lark(part, is_terminal=True) for part in parts) or '""'
        written: list[str] = []
        run: list[str] = []
        for part in parts:
            if self._is_terminal(part):
                run.append(self._lark(part, is_terminal=True))
                continue
            written += [self._terminal(" ".join(run))] if run else []
            run = []
            written.append(self._lark(part, is_terminal=False))
        written += [self._terminal(" ".join(run))] if run else []
        return " ".join(written) or '""'

    def _terminal(self, body: str) -> str:
        self._extra += 1
        return self._define(f"GBNF_PART_{self._extra}", body)
