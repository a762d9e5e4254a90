"""The interface of embedding models, and the check of what they are asked to embed."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backends.stepper import BoundsTokens
from core.errors import ContextLengthExceeded, EngineFailed, RequestError


class EmbeddingModel(Protocol):
    """A loaded embedding model; opened, used and closed on one thread.

    Only `tokenize` and `vocabulary_size` are used on others, before `close`.
    """

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids; requests with others are refused."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text` with the model's special tokens, not truncated.

        Thread-safe.
        """
        ...

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector per list, float32 (len(token_lists), dimension); blocks.

        They are pooled and normalised as the model wants it.  Lists differ in length and are not
        empty; together they fit the `BatchLimits` of the engine.
        """
        ...

    def close(self) -> None:
        """Free the weights; called once."""
        ...


def input_tokens(
    model: EmbeddingModel, text: str | Sequence[int], context_tokens: int
) -> list[int]:
    """Return the tokens of one input.  Raises RequestError, ContextLengthExceeded.

    A long text is refused without tokenizing all of it, by a model that `BoundsTokens`.
    """
    if isinstance(text, str):
        fewest = model.fewest_tokens(text, context_tokens) if isinstance(model, BoundsTokens) else 0
        if fewest > context_tokens:
            raise ContextLengthExceeded.of(fewest, context_tokens, is_least=True)
        # For an empty text, a tokenizer would still return its special tokens.
        ids = model.tokenize(text) if text else []
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
        raise RequestError("An input is empty; remove it.", param="input")
    if len(ids) > context_tokens:
        raise ContextLengthExceeded.of(len(ids), context_tokens)
    return ids


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
