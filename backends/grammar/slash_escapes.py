r"""Adds `\/` to the token masks of JSON grammars, where llguidance allows `/` only.

Wherever an escape may begin in a string, a slash may also be written `\/` (RFC 8259, section 7):
tokens with `\/` are allowed where those with `/` are, and the grammar advances by the latter.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backends.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_SLASH = b"\\/"


def without_slash_escapes(data: bytes) -> bytes:
    r"""Return JSON text with `/` for each `\/`; other escapes stay."""
    if _SLASH not in data:
        return data
    return _ESCAPE.sub(lambda found: b"/" if found[1] == b"/" else found[0], data)


def ends_in_escape(data: bytes) -> bool:
    """Whether JSON text ends after the backslash of an escape."""
    return (len(data) - len(data.rstrip(b"\\"))) % 2 == 1


class SlashEscapes:
    """What a vocabulary's tokens stand for without the escapes of slashes.

    `plain` has the token without them for each token with some; `begun` the text before the
    backslash for each token that ends with that of an escape, `begun_inside` for each that does
    so if its first character ends an escape.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Search the vocabulary, which takes some 50 ms for 150,000 tokens."""
        special = frozenset(vocabulary.special)
        tokens = [
            (index, token)
            for index, token in enumerate(vocabulary.tokens)
            if index not in special and (b"\\" in token or b"/" in token)
        ]
        ids = {token: index for index, token in reversed(tokens)}
        # Without a token for it, no escape begins.
        self._backslash = ids.get(b"\\", 0)
        self.begun = {index: token[:-1] for index, token in tokens if ends_in_escape(token)}
        self.begun_inside = {i: token[:-1] for i, token in tokens if ends_in_escape(token[1:])}
        self.slashes = np.array([i for i, token in tokens if token[:1] == b"/"], np.int64)
        self._starts = frozenset(self.slashes.tolist())
        self.plain: dict[int, int] = {}
        inside, opening = [], []
        for index, token in tokens:
            plain = without_slash_escapes(token)
            if plain == token or plain not in ids:
                continue
            self.plain[index] = ids[plain]
            before = token[: token.index(_SLASH)]
            if b'"' not in before:
                inside.append(index)
            elif before + b"\\" in ids:
                opening.append((index, ids[before + b"\\"]))
        inside = inside if b"\\" in ids else []
        self._inside = np.array(inside, np.int64)
        self._opening = np.array(opening, np.int64).reshape(-1, 2)
        self._plain_inside = self._plain_of(inside)
        self._plain_opening = self._plain_of([index for index, _ in opening])

    def _plain_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.array([self.plain[index] for index in indices], np.int64)

    def is_changed(self, token_id: int) -> bool:
        """Whether a token may be accepted otherwise than the grammar itself does."""
        maps = (self.plain, self.begun, self.begun_inside, self._starts)
        return any(token_id in each for each in maps)

    def starts_with_slash(self, token_id: int) -> bool:
        """Whether a token may follow the backslash of an escape."""
        return token_id in self._starts

    def allow(self, words: NDArray[np.uint32]) -> None:
        """Add the tokens with escaped slashes to a mask of 32 tokens a word, in place."""
        backslash = self._backslash
        # A mask of each step: without such tokens, and outside strings, nothing is computed.
        if len(self._inside) and int(words[backslash >> 5]) >> (backslash & 31) & 1:
            _set(words, self._inside[_bits(words, self._plain_inside)])
        if len(self._opening):
            can_escape = _bits(words, self._opening[:, 1]) & _bits(words, self._plain_opening)
            _set(words, self._opening[can_escape, 0])

    def allow_slashes(self, words: NDArray[np.uint32], other: NDArray[np.uint32]) -> None:
        """Add the tokens of another mask that start with a slash, in place."""
        _set(words, self.slashes[_bits(other, self.slashes)])


def _bits(words: NDArray[np.uint32], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    bits: NDArray[np.uint32] = words[ids >> 5] >> (ids & 31).astype(np.uint32)
    return (bits & np.uint32(1)).astype(np.bool_)


def _set(words: NDArray[np.uint32], ids: NDArray[np.int64]) -> None:
    np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


class SlashMatcher:
    r"""A grammar's matcher that also accepts `\/` for a slash, if it has `escapes`.

    After the backslash of an escape, `_before` is the matcher as it was before that.
    """

    def __init__(
        self, tokenizer: "LLTokenizer", matcher: "LLMatcher", escapes: SlashEscapes | None
    ) -> None:
        self.matcher = matcher
        self._tokenizer = tokenizer
        self._escapes = escapes
        self._before: LLMatcher | None = None

    def mask(self, words: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
        """Write the mask of the next token to `words`; `spare` is a buffer of the same length."""
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._escapes is None:
            return
        self._escapes.allow(words)
        if self._before is not None:
            self._before.unsafe_compute_mask_ptr(spare.ctypes.data, spare.nbytes)
            self._escapes.allow_slashes(words, spare)

    def accept(self, token_id: int) -> None:
        """Advance by a token."""
        before, self._before = self._before, None
        escapes = self._escapes
        if escapes is None or not escapes.is_changed(token_id):
            self.matcher.consume_token(token_id)
            return
        plain = escapes.plain.get(token_id, token_id)
        ways = [(self.matcher, token_id), (self.matcher, plain)]
        if before is not None and escapes.starts_with_slash(token_id):
            ways += [(before, token_id), (before, plain)]
        possible = (way for way in ways if way[0].validate_tokens([way[1]]) == 1)
        matcher, used = next(possible, ways[0])
        is_inside = before is not None and matcher is self.matcher
        begun = (escapes.begun_inside if is_inside else escapes.begun).get(token_id)
        copy = None if begun is None else matcher.deep_copy()
        self.matcher = matcher
        matcher.consume_token(used)
        if copy is not None and begun is not None:
            lead = begun[:1] if is_inside else b""
            plain_text = lead + without_slash_escapes(begun[len(lead) :])
            self._before = copy if self._takes(copy, plain_text) else None

    def restart(self, data: bytes) -> bool:
        """Restart the grammar and advance by `data`; return whether it accepts that."""
        self._before = None
        self.matcher.reset()
        is_taken = self._takes(self.matcher, data)
        if self._escapes is None:
            return is_taken
        if not is_taken:
            self.matcher.reset()
            is_taken = self._advances(self.matcher, data)
        if is_taken and ends_in_escape(data):
            copy = self.matcher.deep_copy()
            copy.reset()
            self._before = copy if self._advances(copy, data[:-1]) else None
        return is_taken

    def _advances(self, matcher: "LLMatcher", data: bytes) -> bool:
        return self._takes(matcher, without_slash_escapes(data))

    def _takes(self, matcher: "LLMatcher", data: bytes) -> bool:
        tokens = self._tokenizer.tokenize_bytes(data)
        taken: int = matcher.try_consume_tokens(tokens)
        return taken == len(tokens)
