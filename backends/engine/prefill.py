"""How many prompt tokens each waiting prompt gets in the next step."""

from collections.abc import Sequence

# Steps that also decode should not last longer, so that running streams stay fluent;
# but few streams do not hold up many prompts, of which each would wait for all before it.
_MIXED_STEP_S = 0.12
_MOST_PATIENCE = 4
_SMALLEST_CHUNK = 32
# The oldest prompt always gets this part of a step, so that short ones cannot starve it.
_OLDEST_SHARE = 4
_SMOOTHING = 0.3


class PrefillPlanner:
    """Divides a step's prompt tokens: short prompts first, the oldest never starved.

    While other rows decode, the chunk is as large as the measured speed allows in an
    eighth of a second, or in up to half of one where more prompts wait than rows decode; with
    nobody waiting for tokens it is the full `chunk_tokens`.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._opened_with = self._chunk_tokens = chunk_tokens
        self._token_s = 0.0

    def limit(self, chunk_tokens: int | None) -> None:
        """Plan at most `chunk_tokens` a step from now on; None: as many as at first."""
        most = self._opened_with if chunk_tokens is None else chunk_tokens
        self._chunk_tokens = max(min(most, self._opened_with), 1)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn the time per token from a step that was mostly prefill."""
        if tokens < _SMALLEST_CHUNK:
            return
        sample = seconds / tokens
        known = self._token_s or sample
        self._token_s = known + _SMOOTHING * (sample - known)

    def budget(self, decoding: int, prompts: int) -> int:
        """Return how many tokens of `prompts` the next step may compute beside `decoding` rows."""
        if not decoding or not self._token_s:
            return self._chunk_tokens
        patience = min(max(prompts / decoding, 1.0), _MOST_PATIENCE)
        fluent = int(_MIXED_STEP_S * patience / self._token_s)
        return max(min(fluent, self._chunk_tokens), min(_SMALLEST_CHUNK, self._chunk_tokens))

    def plan(self, pending: Sequence[int], decoding: int) -> list[int]:
        """Return each prompt's chunk; `pending` is in order of arrival, oldest first."""
        chunks = [0] * len(pending)
        if not pending:
            return chunks
        left = self.budget(decoding, len(pending))
        chunks[0] = min(pending[0], max(left // _OLDEST_SHARE, 1))
        left -= chunks[0]
        for index in sorted(range(len(pending)), key=lambda i: (pending[i], i)):
            extra = min(pending[index] - chunks[index], left)
            chunks[index] += extra
            left -= extra
        return chunks
