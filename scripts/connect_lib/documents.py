"""Edits JSON and YAML configuration files, preserving comments, order and layout."""

import copy
import io
import json
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from scripts.connect_lib.problems import ConnectError

# Indentation of mappings and of lists, and the offset of a list's dash.
_STYLES = ((2, 2, 0), (2, 4, 2), (4, 4, 2), (4, 4, 0), (4, 6, 4), (2, 3, 1))

Change = Callable[[Any], None]


def changed_json(text: str | None, change: Change) -> str:
    """Return JSON `text` after `change`, with its indentation preserved.

    Raises ConnectError unless it is a plain JSON object; comments are refused, since they would
    be lost.
    """
    if text is None or not text.strip():
        data: Any = {}
        change(data)
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise ConnectError(
            f"it is not plain JSON ({problem}); remove its comments, or edit it by hand"
        ) from None
    if not isinstance(data, dict):
        raise ConnectError("it is not a JSON object; edit it by hand")
    before = copy.deepcopy(data)
    _apply(change, data)
    if data == before:
        return text
    end = "\n" if text.endswith("\n") else ""
    return json.dumps(data, indent=_json_indent(text), ensure_ascii=False) + end


def changed_yaml(text: str | None, change: Change, *, is_list: bool = False) -> str:
    """Return YAML `text` after `change`, with comments, order and quotes preserved.

    Raises ConnectError if rewriting the file would change anything else.
    """
    if text is None or not text.strip():
        data: Any = [] if is_list else {}
        change(data)
        return _dumped(YAML(), data)
    writer = _faithful_writer(text)
    data = writer.load(text)
    if not isinstance(data, list if is_list else dict):
        raise ConnectError(f"it is not a YAML {'list' if is_list else 'mapping'}; edit it by hand")
    before = copy.deepcopy(data)
    _apply(change, data)
    if data == before:
        return text
    result = _dumped(writer, data)
    if writer.load(result) != data:
        raise ConnectError("rewriting it would change its meaning; edit it by hand")
    return result


def _apply(change: Change, data: Any) -> None:
    """Apply `change` to `data`.  Raises ConnectError if the file has an unexpected structure."""
    try:
        change(data)
    except (AttributeError, TypeError, KeyError, IndexError) as problem:
        raise ConnectError(
            f"its structure is not the one that the client writes ({problem}); edit it by hand"
        ) from problem


def _faithful_writer(text: str) -> YAML:
    """Return a YAML writer whose style reproduces `text` exactly.  Raises ConnectError."""
    try:
        for mapping, sequence, offset in _STYLES:
            writer = YAML()
            writer.preserve_quotes = True
            writer.width = 1_000_000
            writer.indent(mapping=mapping, sequence=sequence, offset=offset)
            if _dumped(writer, writer.load(text)) == text:
                return writer
    except (YAMLError, ValueError, RecursionError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise ConnectError(f"it is not valid YAML ({reason}); correct it first") from None
    raise ConnectError("its comments or layout could not be preserved; edit it by hand")


def _dumped(writer: YAML, data: Any) -> str:
    out = io.StringIO()
    writer.dump(data, out)
    return out.getvalue()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _json_indent(text: str) -> int | str:
    for line in text.splitlines()[1:]:
        space = line[: len(line) - len(line.lstrip())]
        if space:
            return "\t" if space.startswith("\t") else len(space)
    return 2
