"""Tokenizes text with llama.cpp: any text of any length, without overflowing the stack."""

import ctypes
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from backends.cancellation import check_cancelled
from backends.gguf.pieces import (
    ABORTS_AT_BLANKS,
    PIECE_CHARACTERS,
    STACK_BYTES_PER_CHARACTER,
    Specials,
    cut_after_specials,
    cut_before_unknown,
    text_pieces,
)
from backends.token_bounds import fewest_tokens, may_fit
from core.errors import RequestError
from core.stack import call_with_stack
from core.units import MIB

# Text up to this length is safe on any thread: it takes 2 MiB of stack at most.
_DIRECT_CHARACTERS = 2048
# Shorter text has too few special tokens and unknown characters for their quadratic time to matter.
_UNCUT_CHARACTERS = 16 * 1024
# Longer text takes about a second or more; other work goes first.
_BACKGROUND_CHARACTERS = 512 * 1024
_SET_CHARACTERS = 16 * 1024
# More than most tokens have.
_PIECE_BYTES = 512
_STACK_BYTES = PIECE_CHARACTERS * STACK_BYTES_PER_CHARACTER + 8 * MIB


class GgufTokenization:
    """Tokenizes text with one model's vocabulary.  Thread-safe; blocks without the GIL."""

    def __init__(self, llama: Any, vocabulary: Any, pre_tokenizer: str) -> None:
        self._llama = llama
        self._vocabulary = vocabulary
        self._kind = llama.llama_vocab_type(self._vocabulary)
        self._pre_tokenizer = pre_tokenizer
        self._size = int(llama.llama_vocab_n_tokens(self._vocabulary))

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`; `add_special` adds those that begin and end a text.

        Raises RequestError for text that is not valid Unicode or not in the vocabulary.
        """
        self._check(text)
        if self._is_safe(len(text)):
            return self._checked(self._tokenize(text, add_special, parse_special))
        return self._checked(
            call_with_stack(
                _STACK_BYTES,
                lambda: self._encode_long(text, add_special, parse_special),
                is_background=len(text) > _BACKGROUND_CHARACTERS,
            )
        )

    def _encode_long(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        # After a special token, text is tokenized as at the start of a text.
        chunks = [text]
        if len(text) > _UNCUT_CHARACTERS:
            chunks = list(cut_after_specials(text, self._specials))
        kinds = {
            self._llama.LLAMA_VOCAB_TYPE_BPE: self._byte_pairs,
            self._llama.LLAMA_VOCAB_TYPE_SPM: self._sentence_pieces,
        }
        if len(chunks) == 1 and self._kind not in kinds:
            return self._tokenize(text, add_special, parse_special)
        before, after = self.around if add_special else ([], [])
        ids = list(before)
        for chunk in chunks:
            for each in kinds.get(self._kind, self._whole)(chunk, parse_special):
                check_cancelled()
                ids += each
        return [*ids, *after]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that begin and end a text."""
        around = self._tokenize("", True, False)
        begin = 1 if len(around) > 1 else len(around) * self._adds_bos
        return around[:begin], around[begin:]

    def _is_safe(self, length: int) -> bool:
        """Whether text of this length can be tokenized at once, on any thread."""
        return length <= _DIRECT_CHARACTERS and self._pre_tokenizer not in ABORTS_AT_BLANKS

    def _whole(self, text: str, parse_special: bool) -> Iterator[list[int]]:
        yield self._tokenize(text, False, parse_special)

    def _byte_pairs(self, text: str, parse_special: bool) -> Iterator[list[int]]:
        for piece in text_pieces(text, self._pre_tokenizer):
            yield self._tokenize(piece, False, parse_special)

    def _sentence_pieces(self, text: str, parse_special: bool) -> Iterator[list[int]]:
        """Tokenize in pieces that begin with unknown characters."""
        if len(text) <= _UNCUT_CHARACTERS:
            yield self._tokenize(text, False, parse_special)
            return
        unknown = "".join(each for each in _characters(text) if self._is_unknown(each))
        first, *pieces = cut_before_unknown(text, unknown, self._specials.ends)
        yield self._tokenize(first, False, parse_special)
        for piece in pieces:
            # An unknown character is its bytes; what precedes them is the mark of a word.
            own = len(self._tokenize(piece[0], False, parse_special)) - len(piece[0].encode())
            yield self._tokenize(piece, False, parse_special)[own:]

    def _is_unknown(self, character: str) -> bool:
        """Whether no token contains the character, so that it is written as bytes."""
        return character != " " and character not in self._characters

    @cached_property
    def _characters(self) -> frozenset[str]:
        """The characters that some token contains."""
        return frozenset().union(*(piece.decode("utf-8", "ignore") for piece in self.pieces))

    def read_vocabulary(self) -> None:
        """Read now what long texts need to know of the vocabulary; takes some 100 ms."""
        _ = self._specials, self._longest, self._has_all_bytes

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""
        self._check(text)
        # Most prompts: no thread with a large stack is started for them.
        if may_fit(text, limit):
            return 0

        def count(piece: str) -> int:
            return len(self._encode_long(piece, False, True))

        return call_with_stack(
            _STACK_BYTES,
            lambda: fewest_tokens(text, limit, lambda: self._longest, count),
            is_background=len(text) > _BACKGROUND_CHARACTERS,
        )

    def _tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        while True:
            buffer = (self._llama.llama_token * room)()
            count = self._llama.llama_tokenize(
                self._vocabulary, data, len(data), buffer, room, add_special, parse_special
            )
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def _check(self, text: str) -> None:
        """Raise RequestError for text on which llama.cpp would end the process."""
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                "The text is not valid Unicode: it has an unpaired surrogate.", param="prompt"
            ) from error
        if self._kind == self._llama.LLAMA_VOCAB_TYPE_SPM and not self._has_all_bytes:
            unknown = next((each for each in _characters(text) if not self._is_known(each)), None)
            if unknown is not None:
                raise self._unknown(repr(unknown))

    def _is_known(self, character: str) -> bool:
        data = character.encode()
        return data in self._piece_set or all(bytes([each]) in self._piece_set for each in data)

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and min(ids) < 0:
            raise self._unknown("some characters of the text")
        return ids

    @staticmethod
    def _unknown(what: str) -> RequestError:
        return RequestError(
            f"The model's vocabulary has no token for {what}, and none for single bytes. "
            "Remove it, or use another model.",
            param="prompt",
        )

    @cached_property
    def _specials(self) -> Specials:
        """The texts that are tokens of their own wherever they stand."""
        return Specials(frozenset(self.added_ids))

    @cached_property
    def added_ids(self) -> dict[str, int]:
        """The ids of the tokens that `_specials` are the texts of."""
        llama = self._llama
        wanted = (
            llama.LLAMA_TOKEN_ATTR_CONTROL
            | llama.LLAMA_TOKEN_ATTR_USER_DEFINED
            | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        )
        found = (index for index, each in enumerate(self.attributes) if each & wanted)
        texts = (
            (self.piece(each, special=True).decode("utf-8", "replace"), each) for each in found
        )
        return {text: token_id for text, token_id in texts if text}

    def is_control(self, token_id: int) -> bool:
        """Whether llama.cpp finds the token in a text with `parse_special` only."""
        llama = self._llama
        kinds = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(self.attributes[token_id] & kinds)

    def strips(self, token_id: int) -> tuple[bool, bool]:
        """Return whether a special token takes the blanks before it, and those behind it."""
        flags, llama = self.attributes[token_id], self._llama
        return (
            bool(flags & llama.LLAMA_TOKEN_ATTR_LSTRIP),
            bool(flags & llama.LLAMA_TOKEN_ATTR_RSTRIP),
        )

    @property
    def is_sentence_piece(self) -> bool:
        """Whether a mark of a word may be put before a text."""
        return bool(self._kind == self._llama.LLAMA_VOCAB_TYPE_SPM)

    @cached_property
    def _adds_bos(self) -> bool:
        return bool(self._llama.llama_vocab_get_add_bos(self._vocabulary))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token, of control tokens their name."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        return [self._read_piece(each, True, buffer) for each in range(self._size)]

    @cached_property
    def attributes(self) -> list[int]:
        """The flags `LLAMA_TOKEN_ATTR_*` of each token."""
        read = self._llama.llama_vocab_get_attr
        return [read(self._vocabulary, each) for each in range(self._size)]

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """Return a token's bytes; with `special`, control tokens give their name."""
        return self._read_piece(token_id, special, ctypes.create_string_buffer(_PIECE_BYTES))

    def _read_piece(self, token_id: int, special: bool, buffer: Any) -> bytes:
        count = self._llama.llama_token_to_piece(
            self._vocabulary, token_id, buffer, len(buffer), 0, special
        )
        if count < 0:
            return self._read_piece(token_id, special, ctypes.create_string_buffer(-count))
        return ctypes.string_at(buffer, count)

    @cached_property
    def _piece_set(self) -> frozenset[bytes]:
        return frozenset(self.pieces)

    @cached_property
    def _has_all_bytes(self) -> bool:
        return all(bytes([each]) in self._piece_set for each in range(256))

    @cached_property
    def _longest(self) -> int | None:
        """Most bytes that a token stands for; None if some tokens stand for any number."""
        llama = self._llama
        kinds = (llama.LLAMA_VOCAB_TYPE_SPM, llama.LLAMA_VOCAB_TYPE_BPE)
        # Other kinds replace unknown words of any length, and normalizers of theirs drop text.
        if self._kind not in kinds or not self._has_all_bytes:
            return None
        strips = llama.LLAMA_TOKEN_ATTR_LSTRIP | llama.LLAMA_TOKEN_ATTR_RSTRIP
        if any(each & strips for each in self.attributes):
            return None
        return max(map(len, self.pieces))


def _characters(text: str) -> set[str]:
    """Return the characters of `text`; a set of a long text at once would hold the global lock."""
    found: set[str] = set()
    for start in range(0, len(text), _SET_CHARACTERS):
        found.update(text[start : start + _SET_CHARACTERS])
    return found
