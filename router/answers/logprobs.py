"""Formats log probabilities for OpenAI's APIs: chat's list, the legacy columns, vLLM's prompt."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from core.types import GenerationEvent, JsonValue, PrefillProgress, TokenLogprob

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


def scored_prompt(events: Iterable[GenerationEvent]) -> tuple[TokenLogprob, ...]:
    """Return the prompt's tokens with their log-probabilities, if one of the events has them."""
    progress = (event.logprobs for event in events if isinstance(event, PrefillProgress))
    return next((logprobs for logprobs in progress if logprobs), ())


def prompt_logprobs(tokens: Sequence[TokenLogprob], top: int) -> list[JsonValue]:
    """Return vLLM's `prompt_logprobs`: null for the first token, then objects by token id.

    Each has the token itself and the `top` likeliest; `rank` is null beyond the known ones.
    Source: vLLM, `vllm/entrypoints/openai/chat_completion/protocol.py` and `vllm/logprobs.py`.
    """
    listed: list[JsonValue] = []
    for token in tokens:
        if math.isnan(token.logprob):
            listed.append(None)
            continue
        ranks = {each.token_id: rank for rank, each in enumerate(token.top, 1)}
        shown = {each.token_id: each for each in (token, *token.top[:top])}
        listed.append(
            {
                str(token_id): {
                    "logprob": _finite(each.logprob),
                    "rank": ranks.get(token_id),
                    "decoded_token": token_text(each),
                }
                for token_id, each in shown.items()
            }
        )
    return listed


def without_prefix(text: str, tokens: Sequence[TokenLogprob]) -> Sequence[TokenLogprob]:
    """Return the tokens of an echoed text without the bytes that are not part of it.

    Some tokenizers put a control token or a blank before a text.
    """
    wanted, spelled = text.encode("utf-8", "replace"), b"".join(token.data for token in tokens)
    extra = len(spelled) - len(wanted)
    if extra <= 0 or not spelled.endswith(wanted):
        return tokens
    shown: list[TokenLogprob] = []
    for token in tokens:
        cut = min(extra, len(token.data))
        extra -= cut
        shown.append(replace(token, data=token.data[cut:]) if cut else token)
    return shown


def event_logprobs(tokens: Sequence[TokenLogprob]) -> list[JsonValue]:
    """Return the `logprobs` of the Responses API's text events, which have no `bytes`.

    Source: OpenAI's description, `ResponseLogProb`; the item that follows has the bytes.
    """
    return [
        {**_brief(token), "top_logprobs": [_brief(top) for top in token.top or ()]}
        for token in tokens
    ]


def _brief(token: TokenLogprob) -> dict[str, JsonValue]:
    return {"token": token_text(token), "logprob": _finite(token.logprob)}


class LegacyLogprobs:
    """Builds the completions' `logprobs`; remembers one choice's text offset between chunks."""

    def __init__(self, top: int | None = None) -> None:
        """`top` is the number of alternatives listed; None: as many as there are."""
        self._offset = 0
        self._top = top
        self._held: Sequence[TokenLogprob] | None = None
        self._echo_end = 0

    def hold(self, tokens: Sequence[TokenLogprob]) -> None:
        """Take the tokens of an echoed prompt, whose text comes next; once."""
        if self._held is None and not self._offset:
            self._held = tokens

    def echoed(self, text: str) -> Sequence[TokenLogprob]:
        """Return the held tokens at the first text, then nothing."""
        if not self._held or not text:
            return ()
        held, self._held = self._held, ()
        self._echo_end = len(text)
        return without_prefix(text, held)

    def columns(self, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, list[JsonValue]]:
        """Return the columns for the next piece of text; without tokens they are empty.

        Text without logprobs, such as an echoed prompt, only moves the offset.  The alternatives of
        a token always contain the token itself, also where it is not among the likeliest ones; the
        first token of a prompt has none.  Source: OpenAI's API reference, completions, `logprobs`.
        """
        columns: dict[str, list[JsonValue]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            token_words = token_text(token)
            columns["tokens"].append(token_words)
            if self._echo_end and math.isnan(token.logprob):
                columns["token_logprobs"].append(None)
                columns["top_logprobs"].append(None)
            else:
                columns["token_logprobs"].append(_finite(token.logprob))
                columns["top_logprobs"].append(self._alternatives(token, token_words))
            columns["text_offset"].append(self._offset)
            self._offset += len(token_words)
        if self._echo_end:
            # Tokens with a part of a character have other texts than the prompt's.
            self._offset, self._echo_end = self._echo_end, 0
        if not tokens:
            self._offset += len(text)
        return columns

    def _alternatives(self, token: TokenLogprob, token_words: str) -> dict[str, JsonValue]:
        alternatives: dict[str, JsonValue] = {}
        for alternative in (token.top or ())[: self._top]:
            alternatives.setdefault(token_text(alternative), _finite(alternative.logprob))
        # Another token may have the same text, such as U+FFFD; the chosen one wins.
        alternatives[token_words] = _finite(token.logprob)
        return alternatives
