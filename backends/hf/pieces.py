"""Converts the vocabulary entries of a tokenizer.json to bytes."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_SPACE_MARK = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def byte_alphabet() -> Mapping[str, int]:
    """Return the byte for each character of a byte-level vocabulary.

    Source: GPT-2's `bytes_to_unicode`: printable bytes are their own characters.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


@dataclass(frozen=True, slots=True)
class PieceReader:
    """Converts a vocabulary entry to the bytes that it adds to the preceding text.

    `replacements` are (old, new) strings; an entry with `joined_prefix` continues a word and all
    others start one; `word_end` marks the end of a word.
    """

    is_byte_level: bool = False
    has_byte_tokens: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    joined_prefix: str = ""
    word_end: str = ""

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> "PieceReader":
        """Read the decoder of a tokenizer.json, or its pre-tokenizer if it has none."""
        parts = list(_parts(tokenizer.get("decoder"), "decoders"))
        parts = parts or list(_parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))
        kinds = {part.get("type") for part in parts}
        model = tokenizer.get("model")
        falls_back = isinstance(model, dict) and model.get("byte_fallback") is True
        return cls(
            is_byte_level="ByteLevel" in kinds,
            has_byte_tokens="ByteFallback" in kinds or falls_back,
            replacements=tuple(_replacements(parts)),
            joined_prefix=_text_of(parts, "WordPiece", "prefix"),
            word_end=_text_of(parts, "BPEDecoder", "suffix"),
        )

    def read(self, token: str) -> bytes:
        """Return the bytes of a vocabulary entry that is not an added token."""
        if self.has_byte_tokens and (match := _BYTE.fullmatch(token)):
            return bytes((int(match[1], 16),))
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.is_byte_level:
            alphabet = byte_alphabet()
            if all(char in alphabet for char in token):
                return bytes(alphabet[char] for char in token)
        if self.joined_prefix:
            is_joined = token.startswith(self.joined_prefix)
            token = token[len(self.joined_prefix) :] if is_joined else f" {token}"
        if self.word_end and token.endswith(self.word_end):
            token = f"{token.removesuffix(self.word_end)} "
        return token.encode("utf-8", "replace")


def piece_reader(tokenizer: Any) -> PieceReader:
    """Return the reader for a `tokenizers.Tokenizer`, without serialising its vocabulary."""

    def described(part: Any) -> Any:
        return None if part is None else json.loads(part.__getstate__())

    return PieceReader.of(
        {
            "decoder": described(tokenizer.decoder),
            "pre_tokenizer": described(tokenizer.pre_tokenizer),
            "model": {"byte_fallback": getattr(tokenizer.model, "byte_fallback", False)},
        }
    )


def _parts(value: object, key: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder or pre-tokenizer; sequences are flattened."""
    if not isinstance(value, dict):
        return
    inner = value.get(key)
    if value.get("type") == "Sequence" and isinstance(inner, list):
        for part in inner:
            yield from _parts(part, key)
    else:
        yield value


def _replacements(parts: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for part in parts:
        pattern, content = part.get("pattern"), part.get("content")
        if part.get("type") == "Metaspace":
            mark = part.get("replacement")
            yield (mark if isinstance(mark, str) and mark else _SPACE_MARK), " "
        elif part.get("type") == "Replace" and isinstance(pattern, dict):
            old = pattern.get("String")
            if isinstance(old, str) and old and isinstance(content, str):
                yield old, content


def _text_of(parts: list[Mapping[str, Any]], kind: str, key: str) -> str:
    found = (part.get(key) for part in parts if part.get("type") == kind)
    value = next(found, "")
    return value if isinstance(value, str) else ""
