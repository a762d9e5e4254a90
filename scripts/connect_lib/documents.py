"""Configuration files as objects: changed in place, with everything else kept as it is."""

import copy
import io
import json
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from scripts.connect_lib.problems import ConnectError

# How deep mappings and lists are indented, and where a list's dash stands.
_STYLES = ((2, 2, 0), (2, 4, 2), (4, 4, 2), (4, 4, 0), (4, 6, 4), (2, 3, 1))

Change = Callable[[Any], None]


def changed_json(text: str | None, change: Change) -> str:
    """Return JSON `text` after `change`, in its own indentation.

    Raises ConnectError for what is no plain JSON object, comments included: they would be lost.
    """
    if text is None or not text.strip():
        data: Any = {}
        change(data)
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise ConnectError(
            f"it is not plain JSON ({problem}); comments could not be kept"
        ) from None
    if not isinstance(data, dict):
        raise ConnectError("it holds no JSON object")
    before = copy.deepcopy(data)
    _apply(change, data)
    if data == before:
        return text
    end = "\n" if text.endswith("\n") else ""
    return json.dumps(data, indent=_json_indent(text), ensure_ascii=False) + end


def changed_yaml(text: str | None, change: Change, *, is_list: bool = False) -> str:
    """Return YAML `text` after `change`, with comments, order and quotes as they are.

    Raises ConnectError where writing it again would change more than what is meant.
    """
    if text is None or not text.strip():
        data: Any = [] if is_list else {}
        change(data)
        return _dumped(YAML(), data)
    writer = _faithful_writer(text)
    data = writer.load(text)
    if not isinstance(data, list if is_list else dict):
        raise ConnectError(f"it holds no YAML {'list' if is_list else 'mapping'}")
    before = copy.deepcopy(data)
    _apply(change, data)
    if data == before:
        return text
    result = _dumped(writer, data)
    if writer.load(result) != data:
        raise ConnectError("writing it again would change its meaning")
    return result


def _apply(change: Change, data: Any) -> None:
    """Change `data`; a part of another shape than the client's own is the file's fault."""
    try:
        change(data)
    except (AttributeError, TypeError, KeyError, IndexError) as problem:
        raise ConnectError(f"a part of it is not as the client writes it ({problem})") from problem


def _faithful_writer(text: str) -> YAML:
    """Return a writer that writes what it read without a difference."""
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
        raise ConnectError(f"it is not valid YAML ({reason})") from None
    raise ConnectError("its comments or layout could not be kept")


def _dumped(writer: YAML, data: Any) -> str:
    out = io.StringIO()
    writer.dump(data, out)
    return out.getvalue()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _json_indent(text: str) -> int | str:
    for line in text.splitlines()[1:]:
        space = line[: len(line) - len(line.lstrip())]
        if space:
            return "\t" if space.startswith("\t") else len(space)
    return 2
