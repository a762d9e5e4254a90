"""Writes a Lark grammar without recursion as a regex, which can bind a string in a JSON schema.

Source: Lark's grammar reference, https://lark-parser.readthedocs.io/en/stable/grammar.html.
"""

import json
import re
from collections.abc import Mapping

# Terminals of Lark's own library, `%import common.NAME`.
_COMMON = {
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "DIGIT": "[0-9]",
    "INT": "[0-9]+",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
}
_RULE = re.compile(r"[?!]*([A-Za-z_]\w*)(?:\.-?\d+)?\s*:(.*)", re.DOTALL)
_IMPORT = re.compile(r"%import\s+common\.(\w+)(?:\s*->\s*(\w+))?\s*$")
_IMPORTS = re.compile(r"%import\s+common\s*\(([\w\s,]*)\)\s*$")
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<range>"(?:[^"\\]|\\.)"\s*\.\.\s*"(?:[^"\\]|\\.)")
    | (?P<text>"(?:[^"\\\n]|\\.)*"i?)
    | (?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*)
    | (?P<alias>->\s*\w+)
    | (?P<name>[A-Za-z_]\w*)
    | (?P<count>~\s*\d+(?:\s*\.\.\s*\d+)?)
    | (?P<sign>[()|?*+]|\[|\])
    )""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"^\s*//.*$", re.MULTILINE)
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")
_LOOK_AROUND = re.compile(r"\(\?(?:<?[=!]|P=)|\\[1-9bBAZ]")
_MAX_DEPTH = 64


def lark_regex(grammar: str, max_characters: int) -> str | None:
    """Return a regex of the texts that the grammar's `start` describes.

    None for a grammar that has none of at most `max_characters`, or uses what is not known here:
    recursion, `%ignore`, templates, other imports, look-around.
    """
    rules = _rules(grammar)
    if rules is None:
        return None
    try:
        return _Writer(rules, max_characters).rule("start")
    except ValueError:
        return None


def _rules(grammar: str) -> Mapping[str, str] | None:
    """Return the text of each rule; None if a statement is not known."""
    statements: list[str] = []
    for line in _COMMENT.sub("", grammar).splitlines():
        if not line.strip():
            continue
        if statements and (line[0].isspace() or line.startswith("|")):
            statements[-1] += f"\n{line}"
        else:
            statements.append(line)
    rules: dict[str, str] = {}
    for statement in statements:
        if (imports := _IMPORTS.match(statement)) is not None:
            rules.update((name, name) for name in re.findall(r"\w+", imports[1]))
        elif (imported := _IMPORT.match(statement)) is not None:
            rules[imported[2] or imported[1]] = imported[1]
        elif (rule := _RULE.match(statement)) is not None and rule[1] not in rules:
            rules[rule[1]] = rule[2]
        else:
            return None
    return rules


class _Writer:
    """Writes rules as regexes; raises ValueError for what cannot be written."""

    def __init__(self, rules: Mapping[str, str], max_characters: int) -> None:
        self._rules = rules
        self._max_characters = max_characters
        self._written: dict[str, str | None] = {}

    def rule(self, name: str) -> str:
        """Return the regex of a rule or terminal."""
        text = self._rules.get(name)
        if name in self._written or text is None or text == name:
            known = self._written.get(name) or _COMMON.get(name if text == name else "")
            if known is None:
                raise ValueError(f"recursive or unknown: {name}")
            return known
        if text in _COMMON and text not in self._rules:
            return _COMMON[text]
        if len([one for one in self._written.values() if one is None]) > _MAX_DEPTH:
            raise ValueError("rules refer to each other too deeply")
        self._written[name] = None
        self._written[name] = written = self._expansions(text)
        return written

    def _expansions(self, text: str) -> str:
        open_groups = _OpenGroups(self._max_characters)
        position = 0
        text = text.rstrip()
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise ValueError("not a known form of a rule")
            position = token.end()
            kind, value = token.lastgroup or "", token[token.lastgroup or 0]
            match kind, value:
                case "sign", "(" | "[":
                    open_groups.open(value)
                case "sign", ")" | "]":
                    open_groups.close(value)
                case "sign", "|":
                    open_groups.groups[-1].append([])
                case (("sign" | "count"), _):
                    open_groups.repeat(value)
                case "alias", _:
                    pass
                case _:
                    open_groups.add(self._atom(kind, value))
        return open_groups.whole()

    def _atom(self, kind: str, value: str) -> str:
        match kind:
            case "name":
                return self.rule(value)
            case "text":
                text = str(json.loads(value.removesuffix("i"), strict=False))
                escaped = _SPECIAL.sub(r"\\\g<0>", text)
                return f"(?i:{escaped})" if value.endswith("i") else escaped
            case "range":
                low, high = (json.loads(end) for end in re.findall(r'"(?:[^"\\]|\\.)"', value))
                if low > high:
                    raise ValueError("an empty range")
                return f"[\\x{{{ord(low):x}}}-\\x{{{ord(high):x}}}]"
        body, _, flags = value[1:].rpartition("/")
        body = body.replace("\\/", "/")
        if _LOOK_AROUND.search(body) or set(flags) - set("ims"):
            raise ValueError("the regex has no equal here")
        return f"(?{flags}:{body})"


class _OpenGroups:
    """The groups of a rule that are still open: lists of alternatives, each a list of pieces.

    Lengths are checked before strings are joined, so that short rules cannot write long ones.
    """

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._added = 0
        self._closers: list[str] = []
        self.groups: list[list[list[str]]] = [[[]]]

    def open(self, bracket: str) -> None:
        self.groups.append([[]])
        self._closers.append(")" if bracket == "(" else "]")

    def close(self, bracket: str) -> None:
        if not self._closers or self._closers.pop() != bracket:
            raise ValueError("brackets do not match")
        group = self._joined(self.groups.pop())
        self.groups[-1][-1].append(group if bracket == ")" else f"{group}?")

    def add(self, regex: str) -> None:
        self._added += len(regex)
        if self._added > self._max_characters:
            raise ValueError("too long")
        self.groups[-1][-1].append(regex)

    def repeat(self, sign: str) -> None:
        pieces = self.groups[-1][-1]
        if not pieces or len(pieces[-1]) > self._max_characters:
            raise ValueError("nothing to repeat, or too long")
        if sign.startswith("~"):
            low, _, high = "".join(sign[1:].split()).partition("..")
            sign = f"{{{low},{high}}}" if high else f"{{{low}}}"
        pieces[-1] = f"(?:{pieces[-1]}){sign}"

    def whole(self) -> str:
        if self._closers:
            raise ValueError("a bracket is open")
        return self._joined(self.groups[0])

    def _joined(self, alternatives: list[list[str]]) -> str:
        regex = f"(?:{'|'.join(''.join(pieces) for pieces in alternatives)})"
        if len(regex) > self._max_characters:
            raise ValueError("too long")
        return regex
