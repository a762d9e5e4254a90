"""Edits TOML text by statements: what is not changed stays byte for byte."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from router.clients.documents import Change, apply_change
from router.clients.problems import ConnectError

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_ASSIGNMENT = re.compile(rf"(\s*{_PART}(?:\s*\.\s*{_PART})*\s*=\s*)")
# Not splitlines, which also splits at characters that may stand within strings.
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_BARE = re.compile(r"[A-Za-z0-9_-]+")

Path: TypeAlias = tuple[str, ...]


@dataclass(slots=True)
class _Statement:
    """A header, an assignment or an empty line; `table` is the one that it stands in or opens.

    `key` is the assignment's key, empty for others; `text` ends in its line break.
    """

    text: str
    table: Path
    key: Path = ()
    is_header: bool = False


def changed_toml(text: str | None, change: Change) -> str:
    """Return TOML `text` after `change`, with comments, order and layout preserved.

    Values must be strings, integers, booleans or tables of them.  Raises ConnectError if the text
    is not valid TOML, or if an edit would change anything else.
    """
    text = text or ""
    try:
        before = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise ConnectError(f"it is not valid TOML ({problem}); correct it first") from None
    wanted = copy.deepcopy(before)
    apply_change(change, wanted)
    differences = list(_differences((), before, wanted))
    if not differences:
        return text
    statements = list(_statements(text))
    if statements and not statements[-1].text.endswith("\n"):
        statements[-1].text += "\n"
    for table, key, value in differences:
        _set(statements, table, key, value)
    result = "".join(statement.text for statement in statements)
    try:
        is_right = tomllib.loads(result) == wanted
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise ConnectError(
            "its tables are written in a form that could not be extended; edit it by hand"
        )
    return result


def _statements(text: str) -> Iterator[_Statement]:
    table: Path = ()
    pending = ""
    for line in _LINE.findall(text):
        pending += line
        # No beginning of a statement of several lines is a valid statement.
        try:
            found = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        if pending.lstrip().startswith("["):
            table = tuple(_only_path(found))
            yield _Statement(pending, table, is_header=True)
        else:
            assignment = _ASSIGNMENT.match(pending)
            key = tuple(_only_path(tomllib.loads(f"{assignment[0]}0"))) if assignment else ()
            yield _Statement(pending, table, key)
        pending = ""
    if pending:
        yield _Statement(pending, table)


def _only_path(found: Any) -> Iterator[str]:
    while found and isinstance(found, (dict, list)):
        if isinstance(found, dict):
            yield next(iter(found))
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]


def _differences(
    table: Path, before: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[Path, str, Any]]:
    """Yield table, key and new value of each difference; None stands for a removal."""
    for key in before:
        if key not in wanted:
            yield table, key, None
    for key, value in wanted.items():
        if isinstance(value, dict):
            old = before.get(key, {})
            yield from _differences((*table, key), old if isinstance(old, dict) else {}, value)
        elif key not in before or before[key] != value or type(before[key]) is not type(value):
            yield table, key, value


def _set(statements: list[_Statement], table: Path, key: str, value: Any) -> None:
    inside = [place for place, known in enumerate(statements) if known.table == table and known.key]
    known = next((place for place in inside if statements[place].key == (key,)), None)
    if known is not None:
        if value is None:
            del statements[known]
        else:
            statements[known].text = _with_value(statements[known].text, _written(value))
        return
    new = _Statement(f"{_quoted(key)} = {_written(value)}\n", table, (key,))
    headers = [
        place for place, known in enumerate(statements) if known.is_header and known.table == table
    ]
    if inside or headers:
        statements.insert(max(inside or headers) + 1, new)
    elif not table:
        place = _after_heading(statements)
        around = [_Statement("\n", ())]
        statements[place:place] = [*(around if place else []), new, *(around if not place else [])]
    else:
        if statements and statements[-1].text.strip():
            statements.append(_Statement("\n", statements[-1].table))
        header = ".".join(map(_quoted, table))
        statements += [_Statement(f"[{header}]\n", table, is_header=True), new]


def _after_heading(statements: Sequence[_Statement]) -> int:
    """Return the place after the comment that begins the file and stands apart, else 0."""
    place = 0
    while place < len(statements) and statements[place].text.startswith("#"):
        place += 1
    is_apart = place == len(statements) or not statements[place].text.strip()
    return place if is_apart else 0


def _with_value(statement: str, written: str) -> str:
    """Return an assignment with another value; a comment after the value stays."""
    assignment = _ASSIGNMENT.match(statement)
    head = assignment[0] if assignment else ""
    rest = statement[len(head) :]
    body = rest.rstrip()
    comment = next(
        (
            rest[place:].rstrip()
            for place, char in enumerate(rest)
            if char == "#" and _is_value(rest[:place])
        ),
        "",
    )
    if comment:
        value = body[: -len(comment)].rstrip()
        comment = body[len(value) :]
    return f"{head}{written}{comment}{rest[len(body) :]}"


def _is_value(text: str) -> bool:
    try:
        tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return False
    return True


def _written(value: Any) -> str:
    # JSON's strings, integers and booleans are TOML's too, except for the character DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quoted(key: str) -> str:
    return key if _BARE.fullmatch(key) else _written(key)
