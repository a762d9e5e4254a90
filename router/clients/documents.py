"""Edits JSON and YAML configuration files, preserving comments, order and layout."""

import copy
import io
import json
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from router.clients.jsonc import edited, parse
from router.clients.problems import ConnectError

# Indentation of mappings and of lists, and the offset of a list's dash.
_STYLES = ((2, 2, 0), (2, 4, 2), (4, 4, 2), (4, 4, 0), (4, 6, 4), (2, 3, 1))

Change = Callable[[Any], None]


def changed_json(text: str | None, change: Change) -> str:
    """Return JSON `text` after `change`; what is not changed stays byte for byte.

    Raises ConnectError unless it is a plain JSON object: the client cannot read comments.
    """
    try:
        json.loads(text if text and text.strip() else "{}", object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise ConnectError(
            f"it is not plain JSON ({problem}); remove its comments, or edit it by hand"
        ) from None
    return changed_jsonc(text, change)


def changed_jsonc(text: str | None, change: Change, *, is_list: bool = False) -> str:
    """Return JSON `text`, which may have comments and trailing commas, after `change`.

    What is not changed stays byte for byte.  Raises ConnectError unless it is a JSON object, or
    list, that can be changed without the loss of an entry or a comment.
    """
    if text is None or not text.strip():
        data: Any = [] if is_list else {}
        apply_change(change, data)
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    root = parse(text)
    if not isinstance(root.value, list if is_list else dict):
        raise ConnectError(f"it is not a JSON {'list' if is_list else 'object'}; edit it by hand")
    wanted = copy.deepcopy(root.value)
    apply_change(change, wanted)
    return edited(text, root, wanted)


def changed_yaml(text: str | None, change: Change, *, is_list: bool = False) -> str:
    """Return YAML `text` after `change`, with comments, order and quotes preserved.

    Raises ConnectError if rewriting the file would change anything else.
    """
    text = text or ""
    lines = text.splitlines()
    if all(line.strip()[:1] in ("", "#") for line in lines):
        data: Any = [] if is_list else {}
        apply_change(change, data)
        # Clients ship their settings as a file of comments, which stay.
        head = f"{text.rstrip()}\n\n" if text.strip() else ""
        return head + _dumped(YAML(), data)
    writer = _faithful_writer(text)
    data = writer.load(text)
    if not isinstance(data, list if is_list else dict):
        raise ConnectError(f"it is not a YAML {'list' if is_list else 'mapping'}; edit it by hand")
    before = copy.deepcopy(data)
    apply_change(change, data)
    if data == before:
        return text
    result = _dumped(writer, data)
    if writer.load(result) != data:
        raise ConnectError("rewriting it would change its meaning; edit it by hand")
    return result


def apply_change(change: Change, data: Any) -> None:
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
