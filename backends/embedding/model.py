"""The interfaces of embedding and reranking models, and the tokens of what they are asked for."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from backends.embedding.inputs import InputTokens, PairTemplate, SpecialTokens, cut_tokens
from backends.stepper import BoundsTokens
from core.errors import ContextLengthExceeded, EngineFailed, RequestError
from core.types import Truncation


class EmbeddingModel(Protocol):
    """A loaded embedding model; opened, used and closed on one thread.

    Only `tokenize`, `special_tokens` and `vocabulary_size` are used on others, before `close`.
    """

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids; requests with others are refused."""
        ...

    @property
    def special_tokens(self) -> SpecialTokens:
        """The special tokens that `tokenize` puts before and after a text."""
        ...

    def tokenize(self, text: str, prompt: str = "") -> list[int]:
        """Return the ids of `prompt` and `text` with the model's special tokens, not truncated.

        Names of control tokens are such tokens in `prompt`, the model's own, and text in `text`.
        Thread-safe.
        """
        ...

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector per list, float32 (len(token_lists), dimension); blocks.

        They are pooled and normalised as the model wants it.  Lists differ in length and are not
        empty; together they fit the `BatchLimits` of the engine.  Those of a pair of texts, or
        with tokens that are not pooled, are `InputTokens`.
        """
        ...

    def close(self) -> None:
        """Free the weights; called once."""
        ...


@runtime_checkable
class PairModel(Protocol):
    """The part of a reranking model that reads pairs; `encode` gives it vectors of one score."""

    @property
    def pair_template(self) -> PairTemplate:
        """The special tokens around a query and a document."""
        ...

    def tokenize_part(self, text: str) -> list[int]:
        """Return the ids of `text`, in which nothing is a control token; thread-safe."""
        ...


@runtime_checkable
class WholePairModel(Protocol):
    """A reranking model whose prompt is tokenized as one text, as long as it fits."""

    def tokenize_pair(self, query: str, document: str) -> list[int]:
        """Return the ids of the whole prompt; thread-safe."""
        ...


def input_tokens(
    model: EmbeddingModel,
    text: str | Sequence[int],
    max_tokens: int,
    truncate: Truncation = "none",
    *,
    prompt: str = "",
    name: str = "input",
) -> InputTokens:
    """Return the tokens of one input, with `prompt` before a text.

    Raises RequestError, and ContextLengthExceeded that calls the input `name` if it is longer than
    `max_tokens` and may not be cut.  A long text is then refused without tokenizing all of it, by
    a model that `BoundsTokens`.
    """
    if isinstance(text, str):
        if truncate == "none" and isinstance(model, BoundsTokens):
            fewest = model.fewest_tokens(text, max_tokens)
            if fewest > max_tokens:
                raise ContextLengthExceeded.of_input(name, fewest, max_tokens, is_least=True)
        # For an empty text, a tokenizer would still return its special tokens.
        ids = model.tokenize(text, prompt) if text else []
    else:
        ids = list(text)
        unknown = next((each for each in ids if not 0 <= each < model.vocabulary_size), None)
        if unknown is not None:
            raise RequestError(
                f"The token id {unknown} is not in the model's vocabulary of "
                f"{model.vocabulary_size} tokens; send text, or ids of this model's tokenizer.",
                param="input",
            )
    if not ids:
        raise RequestError(f"{name} is empty; remove it.", param="input")
    if len(ids) > max_tokens and truncate == "none":
        raise ContextLengthExceeded.of_input(name, len(ids), max_tokens)
    return cut_tokens(ids, max_tokens, truncate, model.special_tokens)


def encode(
    model: EmbeddingModel, token_lists: Sequence[Sequence[int]], name: str
) -> NDArray[np.float32]:
    """Return the model's vectors, one per list, which may not be finite; blocks.

    Raises what the model raises, and EngineFailed for another number of vectors.
    """
    vectors = np.asarray(model.encode(token_lists), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(token_lists):
        raise EngineFailed(
            f"The model {name} computed vectors of shape {vectors.shape} for "
            f"{len(token_lists)} inputs."
        )
    return vectors
