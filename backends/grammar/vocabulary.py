"""A model's tokens as llguidance reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_LONGEST = 16


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a vocabulary, in the order of their ids.

    `tokens` are their bytes, of control tokens the name; `special` are the ids of control tokens,
    which plain text never matches; `ends` are the ids that end an answer, the usual one first.
    """

    tokens: Sequence[bytes]
    special: Sequence[int]
    ends: Sequence[int]

    def tokenizer(self) -> "LLTokenizer":
        """Build the index that token masks are computed with.

        Takes about 0.1 s for 50,000 tokens and holds Python's global lock for that long.
        """
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self), eos_token=list(self.ends) or [0])

    # What llguidance's wrapper reads besides `tokens`.

    @property
    def special_token_ids(self) -> list[int]:
        """The ids of control tokens."""
        return list(self.special)

    @property
    def eos_token_id(self) -> int:
        """The id that usually ends an answer."""
        return self.ends[0] if self.ends else 0

    bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        """Return tokens of text, the longest first: masks do not depend on the choice."""
        data = text.encode() if isinstance(text, str) else text
        ids = []
        start = 0
        while start < len(data):
            stops = range(min(start + _LONGEST, len(data)), start, -1)
            stop = next((each for each in stops if data[start:each] in self._ids), start + 1)
            ids += [self._ids[data[start:stop]]] if data[start:stop] in self._ids else []
            start = stop
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = frozenset(self.special)
        pairs = reversed(list(enumerate(self.tokens)))
        return {token: index for index, token in pairs if index not in special}
