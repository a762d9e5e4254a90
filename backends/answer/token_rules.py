"""Token mask of `ignore_eos`, `min_tokens` and `bad_words`, around that of an answer's format."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from backends.grammar.constraint import TokenMask
from core.types import TokenRules


class VocabularyTexts:
    """The texts of all tokens of a vocabulary, in an order that finds those that begin alike."""

    def __init__(self, token_bytes: Callable[[int], bytes], size: int) -> None:
        """Read `size` tokens, which takes up to half a second; tokens without a text are left out.

        Only ids below `size` are read.
        """
        pairs = sorted((data, index) for index in range(size) if (data := token_bytes(index)))
        self._texts = [data for data, _ in pairs]
        self._ids = np.array([index for _, index in pairs], np.int64)

    def beginning_with(self, start: bytes) -> NDArray[np.int64]:
        """Return the ids of the tokens whose text begins with `start`, which is not empty."""
        # The first text after all that begin so has a larger last byte.
        stem = start.rstrip(b"\xff")
        end = len(self._texts)
        if stem:
            end = bisect_left(self._texts, stem[:-1] + bytes((stem[-1] + 1,)))
        return self._ids[bisect_left(self._texts, start) : end]

    def containing(self, text: bytes) -> NDArray[np.int64]:
        """Return the ids of the tokens whose text contains `text`; takes milliseconds."""
        return self._ids[[index for index, each in enumerate(self._texts) if text in each]]


def _exclude(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
    """Set logits to -inf; a vocabulary may have more tokens than its model has logits."""
    logits[ids[ids < len(logits)]] = -np.inf


class BannedTexts:
    """Bans the tokens that would complete one of some texts, however it is cut into tokens."""

    def __init__(self, texts: Collection[str], vocabulary: VocabularyTexts) -> None:
        """`texts` are not empty.  Blocks for a few milliseconds for each of them."""
        banned = [text.encode("utf-8", "replace") for text in texts]
        self._vocabulary = vocabulary
        self._always = np.unique(np.concatenate([vocabulary.containing(each) for each in banned]))
        self._longest = max(map(len, banned)) - 1
        self._rests: defaultdict[bytes, set[bytes]] = defaultdict(set)
        for each in banned:
            for cut in range(1, len(each)):
                self._rests[each[:cut]].add(each[cut:])
        self._completing: dict[bytes, NDArray[np.int64]] = {}
        self._tail = b""

    def ban(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of the tokens that would complete a text to -inf, in place."""
        _exclude(logits, self._always)
        for length in range(1, len(self._tail) + 1):
            begun = self._tail[-length:]
            if begun in self._rests:
                _exclude(logits, self._ids_completing(begun))

    def _ids_completing(self, begun: bytes) -> NDArray[np.int64]:
        known = self._completing.get(begun)
        if known is None:
            found = [self._vocabulary.beginning_with(rest) for rest in self._rests[begun]]
            known = self._completing[begun] = np.concatenate(found)
        return known

    def accept(self, data: bytes) -> None:
        """Advance by the chosen token's text."""
        if self._longest:
            self._tail = (self._tail + data)[-self._longest :]


class RuleMask:
    """Bans end tokens, where they may not come yet, and the tokens that complete a banned text.

    Implements `backends.grammar.constraint.TokenMask`.  An end token is allowed where nothing else
    is left, such as after a complete answer in the format of `inner`.
    """

    def __init__(
        self,
        rules: TokenRules,
        inner: TokenMask | None,
        *,
        end_ids: Collection[int],
        texts: BannedTexts | None,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        """`end_ids` are the model's end tokens."""
        self._inner = inner
        self._texts = texts
        self._token_bytes = token_bytes
        self._min_tokens = rules.min_tokens
        self._count = 0
        ends = np.array(sorted(end_ids), np.int64)
        stops = np.array(rules.stop_token_ids, np.int64)
        self._later = ends if rules.ignore_eos else ends[:0]
        self._before = np.unique(np.concatenate([ends, stops]))

    @property
    def problem(self) -> str:
        """Why the answer's format could not be enforced; empty if it was."""
        return self._inner.problem if self._inner is not None else ""

    @property
    def is_active(self) -> bool:
        """Whether `apply` would change anything now."""
        if self._texts is not None or len(self._banned_ends):
            return True
        return self._inner is not None and self._inner.is_active

    @property
    def _banned_ends(self) -> NDArray[np.int64]:
        return self._before if self._count < self._min_tokens else self._later

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of disallowed tokens to -inf, in place."""
        if self._inner is not None and self._inner.is_active:
            self._inner.apply(logits)
        if self._texts is not None:
            self._texts.ban(logits)
        ends = self._banned_ends
        if len(ends):
            ends = ends[ends < len(logits)]
            before = logits[ends]
            logits[ends] = -np.inf
            if logits.max() == -np.inf:
                logits[ends] = before

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""
        self._count += 1
        if self._inner is not None:
            self._inner.accept(token_id)
        if self._texts is not None:
            self._texts.accept(self._token_bytes(token_id))


def needs_mask(rules: TokenRules) -> bool:
    """Return whether `rules` exclude tokens; `stop_token_ids` alone do not."""
    return bool(rules.ignore_eos or rules.min_tokens or rules.bad_words)
