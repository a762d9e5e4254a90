"""Tokenizes texts and pairs of texts for encoders, over a model's tokenizer."""

from functools import cached_property
from typing import Literal, Protocol

from backends.embedding.inputs import PairTemplate, SpecialTokens


class Frame(Protocol):
    """The special tokens around texts; see `backends.special_frame`."""

    @property
    def single(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those before and after one text."""
        ...

    @property
    def pair(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Those before, between and after two texts."""
        ...

    @property
    def pair_types(self) -> tuple[tuple[int, ...], ...]:
        """The segments of the five parts of a pair."""
        ...


class TextTokenizer(Protocol):
    """The part of a tokenizer that encoders need; thread-safe."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def special_frame(self) -> Frame:
        """The special tokens around one text and around two."""
        ...

    @property
    def truncation_side(self) -> Literal["start", "end"]:
        """The end at which texts are cut that are too long."""
        ...

    def encode_for_embedding(self, text: str, prompt: str = "") -> list[int]:
        """Return the ids of `prompt` and `text` with special tokens around them.

        Names of control tokens are such tokens in `prompt` only.
        """
        ...

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text`, in which no name is a control token."""
        ...

    def fewest_tokens(self, text: str, limit: int) -> int:
        """See `backends.stepper.BoundsTokens`."""
        ...


class TextInputs:
    """The tokenizing half of an `EmbeddingModel`, and of a `PairModel`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocabulary_size = tokenizer.vocabulary_size

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The special tokens before and after a text."""
        return self._tokenizer.special_frame.single

    @cached_property
    def pair_template(self) -> PairTemplate:
        """The special tokens around a query and a document."""
        frame = self._tokenizer.special_frame
        before, first, between, second, after = frame.pair_types
        return PairTemplate(*frame.pair, before, first[0], between, second[0], after)

    def tokenize(self, text: str, prompt: str = "") -> list[int]:
        """Return the ids of `prompt` and `text` with the model's special tokens."""
        return self._tokenizer.encode_for_embedding(text, prompt)

    def tokenize_part(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it."""
        return self._tokenizer.encode_text(text)

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""
        return self._tokenizer.fewest_tokens(text, limit)
