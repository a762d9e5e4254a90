"""Bounds the number of tokens of a long text from below, without tokenizing all of it."""

from collections.abc import Callable

from backends.cancellation import check_cancelled

# Text with fewer bytes per allowed token is tokenized at once: it may well fit.
_USUAL_BYTES = 6
_PIECE_CHARACTERS = 32 * 1024
# Cutting a text into pieces changes few tokens; so much fewer may be in the whole.
_CERTAIN = 0.8


def may_fit(text: str, limit: int) -> bool:
    """Return whether `text` has so few bytes that it may well fit; its bound is then 0."""
    return _size_bytes(text) <= _USUAL_BYTES * limit


def fewest_tokens(
    text: str, limit: int, longest: Callable[[], int | None], count: Callable[[str], int]
) -> int:
    """Return a lower bound of the tokens of `text`; stops as soon as it exceeds `limit`.

    `longest` returns the most bytes that a token stands for, None if that is unknown; `count`
    tokenizes a piece of text.  Takes time only for text with over 6 bytes per allowed token, and
    then about as much as `limit` tokens take.  Raises Cancelled.
    """
    if may_fit(text, limit):
        return 0
    size = _size_bytes(text)
    most_bytes = longest()
    bound = -(-size // most_bytes) if most_bytes else 0
    counted = 0
    for start in range(0, len(text), _PIECE_CHARACTERS):
        if bound > limit:
            break
        check_cancelled()
        counted += count(text[start : start + _PIECE_CHARACTERS])
        bound = max(bound, int(counted * _CERTAIN))
    return bound


def _size_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
