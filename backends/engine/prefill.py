"""Chunked prefill: how many tokens of each prompt the next step computes."""

from collections.abc import Sequence

# The longest step beside decoding rows, to keep their streams smooth.  Where more prompts wait
# than rows decode, a step may last up to `_MOST_PATIENCE` times as long.
_MIXED_STEP_S = 0.12
_MOST_PATIENCE = 4
_SMALLEST_CHUNK = 32
# The most a step's tokens times the tokens before them may be: 512 up to a context of 32,768, 128
# at 131,072.  Apple's GPU driver ends longer steps (Impacting Interactivity), which was seen from
# 2,048 tokens after 90,000 on.  Source: ml-explore/mlx issue 3267, mlx-lm issue 1572.
_LARGEST_AREA = 1 << 24
# The oldest prompt always gets 1/4 of a step: short prompts cannot starve it.
_OLDEST_SHARE = 4
_SMOOTHING = 0.3


class PrefillPlanner:
    """Divides a step's prompt tokens: short prompts first, the oldest is never starved.

    While other rows decode, the chunk is what the measured speed allows in 0.12 s, or in up to
    0.48 s if more prompts wait than rows decode.  If no row decodes it is `chunk_tokens`.  After
    long contexts it is less, because attention to them makes each token dearer.
    """

    def __init__(self, chunk_tokens: int, *, is_fixed: bool = False) -> None:
        """`is_fixed`: pieces do not shrink with the context, as where they end decides rounding."""
        self._is_fixed = is_fixed
        self._opened_with = self._chunk_tokens = chunk_tokens
        self._token_s = 0.0

    def limit(self, chunk_tokens: int | None) -> None:
        """Plan at most `chunk_tokens` a step from now on; None restores the initial limit."""
        most = self._opened_with if chunk_tokens is None else chunk_tokens
        self._chunk_tokens = max(min(most, self._opened_with), 1)

    def observe(self, tokens: int, seconds: float) -> None:
        """Update the time per token from a step of `tokens` tokens; small steps are ignored."""
        if tokens < _SMALLEST_CHUNK:
            return
        sample = seconds / tokens
        known = self._token_s or sample
        self._token_s = known + _SMOOTHING * (sample - known)

    def budget(self, decoding: int, prompts: int, context: int = 0) -> int:
        """Return the prompt tokens of the next step for `prompts` prompts and `decoding` rows.

        `context` is the most tokens that a prompt has computed before.
        """
        most = self._chunk_tokens
        if not self._is_fixed:
            most = min(most, max(_LARGEST_AREA // max(context, 1), _SMALLEST_CHUNK))
        if not decoding or not self._token_s:
            return most
        patience = min(max(prompts / decoding, 1.0), _MOST_PATIENCE)
        affordable = int(_MIXED_STEP_S * patience / self._token_s)
        return max(min(affordable, most), min(_SMALLEST_CHUNK, most))

    def plan(self, pending: Sequence[int], decoding: int, context: int = 0) -> list[int]:
        """Return the chunk of each prompt; `pending` tokens of each, oldest prompt first."""
        chunks = [0] * len(pending)
        if not pending:
            return chunks
        left = self.budget(decoding, len(pending), context)
        chunks[0] = min(pending[0], max(left // _OLDEST_SHARE, 1))
        left -= chunks[0]
        for index in sorted(range(len(pending)), key=lambda i: (pending[i], i)):
            extra = min(pending[index] - chunks[index], left)
            chunks[index] += extra
            left -= extra
        return chunks
