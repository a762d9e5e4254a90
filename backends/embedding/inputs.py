"""Token ids of the inputs of embeddings and reranking: limits, truncation, pairs of texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.types import Truncation

SpecialTokens = tuple[tuple[int, ...], tuple[int, ...]]


class InputTokens(list[int]):
    """The token ids of one input, with what the model needs beside them.

    `types` holds each token's segment, 0 or 1; empty means that all are 0.  The first `unpooled`
    tokens are computed but not pooled.  `cut` tokens of the input were left out.
    """

    __slots__ = ("cut", "types", "unpooled")

    def __init__(
        self, ids: Iterable[int], *, types: Sequence[int] = (), unpooled: int = 0, cut: int = 0
    ) -> None:
        super().__init__(ids)
        self.types = types
        self.unpooled = unpooled
        self.cut = cut


@dataclass(frozen=True, slots=True)
class PaddedInputs:
    """Rows of token ids padded on the right: all arrays are int64 (rows, longest).

    `mask` is 1 at tokens, `pooled` 1 at tokens that are pooled.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    pooled: NDArray[np.int64]
    types: NDArray[np.int64]


def padded(token_lists: Sequence[Sequence[int]], pad_id: int = 0, length: int = 0) -> PaddedInputs:
    """Return the rows of `token_lists`, padded with `pad_id` to at least `length` tokens."""
    shape = (len(token_lists), max(length, *map(len, token_lists)))
    ids = np.full(shape, pad_id, np.int64)
    mask, pooled, types = (np.zeros(shape, np.int64) for _ in range(3))
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        unpooled = tokens.unpooled if isinstance(tokens, InputTokens) else 0
        pooled[row, unpooled : len(tokens)] = 1
        if isinstance(tokens, InputTokens) and tokens.types:
            types[row, : len(tokens)] = tokens.types
    return PaddedInputs(ids, mask, pooled, types)


def cut_tokens(
    ids: Sequence[int], max_tokens: int, side: Truncation, special: SpecialTokens
) -> InputTokens:
    """Return `ids` cut to `max_tokens`, keeping the special tokens at both ends.

    `side` "start" leaves out the first tokens of the text, anything else the last ones.
    """
    if len(ids) <= max_tokens:
        return InputTokens(ids)
    before, after = special
    head = len(before) if tuple(ids[: len(before)]) == before else 0
    tail = len(after) if after and tuple(ids[len(ids) - len(after) :]) == after else 0
    room = max_tokens - head - tail
    cut = len(ids) - max_tokens
    if room <= 0:
        return InputTokens(ids[:max_tokens], cut=cut)
    text = ids[head : len(ids) - tail]
    kept = text[len(text) - room :] if side == "start" else text[:room]
    return InputTokens([*ids[:head], *kept, *ids[len(ids) - tail :]], cut=cut)


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The special tokens around a pair of texts, and the segment of every part.

    `types` are the segments of the parts in order: `before`, first text, `between`, second text,
    `after`; those of special tokens one by one.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    before_types: tuple[int, ...] = ()
    first_type: int = 0
    between_types: tuple[int, ...] = ()
    second_type: int = 0
    after_types: tuple[int, ...] = ()

    @property
    def special_count(self) -> int:
        """Number of special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(
        self, first: Sequence[int], second: Sequence[int], max_tokens: int, side: Truncation = "end"
    ) -> InputTokens:
        """Return the tokens of a pair, of which the longer text is cut first."""
        counts = pair_lengths(len(first), len(second), max(max_tokens - self.special_count, 0))
        one, two = (
            each[len(each) - count :] if side == "start" else each[:count]
            for each, count in zip((first, second), counts, strict=True)
        )
        types = [
            *(self.before_types or (0,) * len(self.before)),
            *[self.first_type] * len(one),
            *(self.between_types or (0,) * len(self.between)),
            *[self.second_type] * len(two),
            *(self.after_types or (0,) * len(self.after)),
        ]
        return InputTokens(
            [*self.before, *one, *self.between, *two, *self.after],
            types=types if any(types) else (),
            cut=len(first) + len(second) - len(one) - len(two),
        )


def pair_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts are kept, so that both fit in `room`.

    Source: the strategy `longest_first` of the tokenizers library (utils/truncation.rs).
    """
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)
