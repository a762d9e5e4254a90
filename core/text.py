"""Makes text of unknown origin safe: to show in messages, logs and headers, to encode, to parse."""

import re
from itertools import accumulate

# Python's own limit would depend on how deep its caller is.
MAX_JSON_DEPTH = 200
_SHOWN_CHARACTERS = 200
_NOT_STRUCTURE = re.compile(r'(?:"(?:[^"\\]++|\\.)*+"?|[^"\[\]{}]++)++', re.DOTALL)
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def escaped(text: str, limit: int = _SHOWN_CHARACTERS) -> str:
    r"""Return `text` with invisible characters as escapes, cut after `limit` characters.

    Escaped are control characters, line breaks, characters that change the direction of text such
    as U+202E (as `\u202e`), lone surrogates, and all else that `str.isprintable` denies.
    """
    cut = text[:limit]
    if not cut.isprintable():
        cut = "".join(one if one.isprintable() else _escape(one) for one in cut)
    return f"{cut}…" if len(text) > limit else cut


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def well_formed(text: str) -> str:
    """Return `text` with each lone surrogate replaced by U+FFFD and each pair joined."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def is_nested_deeper(text: str, limit: int = MAX_JSON_DEPTH) -> bool:
    """Return whether the JSON text has over `limit` levels; takes linear time, never raises."""
    if text.count("[") + text.count("{") <= limit:
        return False
    brackets = _NOT_STRUCTURE.sub("", text)
    depths = accumulate(map(_STEPS.__getitem__, brackets))
    return max(depths, default=0) > limit
