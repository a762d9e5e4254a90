"""Reads from a tokenizer.json how many bytes of text one token stands for at most."""

from collections.abc import Iterable, Mapping
from typing import Any

# Normal forms compose characters and replace wide ones, for example 4 bytes by 1.
_MOST_SHRUNK = 4
_KEEPS_TEXT = frozenset(["ByteLevel", "Digits", "Metaspace", "UnicodeScripts"])
_NORMAL_FORMS = frozenset(["NFC", "NFD", "NFKC", "NFKD", "Lowercase"])


def longest_token(description: Mapping[str, Any], pieces: Iterable[bytes]) -> int | None:
    """Return the most bytes that a token stands for; None if that has no bound.

    There is none if unknown words become one token, or if text is dropped.  `pieces` are the
    bytes of all tokens, `description` is the content of the tokenizer.json.
    """
    lengths = set(pieces)
    is_complete = all(bytes([each]) in lengths for each in range(256))
    if description.get("model", {}).get("type") != "BPE" or not is_complete:
        return None
    if any(each.get("lstrip") or each.get("rstrip") for each in description["added_tokens"]):
        return None
    if not all(map(_keeps_text, _steps(description.get("pre_tokenizer"), "pretokenizers"))):
        return None
    factor = 1
    for step in _steps(description.get("normalizer"), "normalizers"):
        if step.get("type") in _NORMAL_FORMS:
            factor *= _MOST_SHRUNK
        elif step.get("type") != "Prepend" and not _replaces_by_longer(step):
            return None
    return factor * max(map(len, lengths))


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for each in step.get(key, ()) for inner in _steps(each, key)]
    return [step]


def _keeps_text(step: Mapping[str, Any]) -> bool:
    if step.get("type") in ("Split", "Punctuation"):
        return step.get("behavior") != "Removed"
    return step.get("type") in _KEEPS_TEXT


def _replaces_by_longer(step: Mapping[str, Any]) -> bool:
    old, new = step.get("pattern"), step.get("content")
    if step.get("type") != "Replace" or not isinstance(old, dict) or not isinstance(new, str):
        return False
    text = old.get("String")
    return isinstance(text, str) and len(new.encode()) >= len(text.encode())
