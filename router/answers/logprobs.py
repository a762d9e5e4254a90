"""Formats log probabilities for OpenAI's APIs: chat's list and the legacy columns."""

import math
from collections.abc import Sequence

from core.types import JsonValue, TokenLogprob

# OpenAI's value for an impossible token; JSON has no infinity.
_IMPOSSIBLE = -9999.0


def token_text(token: TokenLogprob) -> str:
    """Return a token's text; incomplete UTF-8 becomes U+FFFD."""
    return (token.data or b"").decode("utf-8", errors="replace")


def _finite(logprob: float | None) -> float:
    if logprob is None or not math.isfinite(logprob):
        return _IMPOSSIBLE
    return max(logprob, _IMPOSSIBLE)


def _entry(token: TokenLogprob) -> dict[str, JsonValue]:
    return {
        "token": token_text(token),
        "bytes": list(token.data or b""),
        "logprob": _finite(token.logprob),
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, JsonValue]:
    """Return chat's `logprobs` object."""
    content: list[JsonValue] = [
        {**_entry(token), "top_logprobs": [_entry(top) for top in token.top or ()]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """Builds the completions' `logprobs`; remembers one choice's text offset between chunks."""

    def __init__(self) -> None:
        self._offset = 0

    def columns(self, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, list[JsonValue]]:
        """Return the columns for the next piece of text; without tokens they are empty.

        Text without logprobs, such as an echoed prompt, only moves the offset.  The alternatives of
        a token always contain the token itself, also where it is not among the likeliest ones.
        Source: OpenAI's API reference, completions, `logprobs`.
        """
        columns: dict[str, list[JsonValue]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            token_words = token_text(token)
            alternatives: dict[str, JsonValue] = {}
            for alternative in token.top or ():
                alternatives.setdefault(token_text(alternative), _finite(alternative.logprob))
            # Another token may have the same text, such as U+FFFD; the chosen one wins.
            alternatives[token_words] = _finite(token.logprob)
            columns["tokens"].append(token_words)
            columns["token_logprobs"].append(_finite(token.logprob))
            columns["top_logprobs"].append(alternatives)
            columns["text_offset"].append(self._offset)
            self._offset += len(token_words)
        if not tokens:
            self._offset += len(text)
        return columns
