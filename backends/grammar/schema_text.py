"""Writes JSON schemas as llguidance reads them: style of the JSON text, and escapes in strings."""

import json
import re
from collections.abc import Mapping

from backends.grammar.schema_limits import without_lookaround
from core.types import JsonValue

WHITESPACE = r"[ \n\t]{0,24}"
# Small models can loop on optional whitespace, so JSON is compact.
_STYLE: Mapping[str, JsonValue] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
# For JSON that the model started itself: free style, but bounded whitespace.
_LENIENT_STYLE: Mapping[str, JsonValue] = {
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": True,
}
# By itself llguidance allows only \u0000 to \u001f and \u007f: \u00e9 would become \u0019.
_ALL_ESCAPES: Mapping[str, JsonValue] = {"json_allow_general_unicode_escapes": True}
_SHORT_ESCAPES: Mapping[str, JsonValue] = {"json_allowed_escapes": 'nrbtf\\"'}
# Escaped punctuation, and what may match a control character or begin with any text.
_PUNCTUATION = re.compile(r"\\[^A-Za-z0-9]")
_WIDE = re.compile(r"[.|\x00-\x1f\x7f]|\[\^|\\[^dw]")
_MAPS = frozenset(["properties", "$defs", "definitions", "dependentSchemas"])
_VALUES = frozenset(["const", "enum", "default", "examples"])


def schema_text(schema: Mapping[str, JsonValue], *, is_lenient: bool = False) -> str:
    r"""Return `schema` as llguidance's JSON text; `is_lenient` ignores unsupported keywords.

    Strings may contain `\uXXXX` for every character.  If a string or a property name has a
    pattern that could match control characters, none may: llguidance would allow only the escapes
    of those there, and a model that begins `\u00e9` would have to end with `\u0019`.
    """
    style = _STYLE
    if is_lenient:
        schema, style = without_lookaround(schema), _LENIENT_STYLE
    escapes = _SHORT_ESCAPES if _has_wide_pattern(dict(schema)) else _ALL_ESCAPES
    return json.dumps({**schema, "x-guidance": {**style, **escapes}}, ensure_ascii=False)


def _has_wide_pattern(schema: JsonValue) -> bool:
    """Return whether strings with a pattern could contain an escaped control character."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += item
        if not isinstance(item, dict):
            continue
        pattern = item.get("pattern")
        if item.get("patternProperties") or (isinstance(pattern, str) and _is_wide(pattern)):
            return True
        for key, value in item.items():
            if key in _MAPS and isinstance(value, dict):
                left += value.values()
            elif key not in _VALUES:
                left.append(value)
    return False


def _is_wide(pattern: str) -> bool:
    text = _PUNCTUATION.sub("", pattern)
    is_anchored = text.startswith("^") and text.endswith("$")
    return not (is_anchored and text.isascii()) or _WIDE.search(text) is not None
