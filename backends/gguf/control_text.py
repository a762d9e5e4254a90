"""Encodes prompts with llama.cpp so that only the template's control tokens are control tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence

from backends.control_tokens import PromptPart
from backends.gguf.tokenization import GgufTokenization

# What llama.cpp strips beside tokens with these flags: isspace of the C locale.
_BLANKS = " \t\n\v\f\r"


class PartEncoder:
    """Encodes the parts of prompts with one vocabulary; `names` are its control tokens' names."""

    def __init__(self, text: GgufTokenization, names: frozenset[str]) -> None:
        self._text = text
        self._ids = {name: token_id for name, token_id in text.added_ids.items() if name in names}
        # llama.cpp finds these also without `parse_special`.
        always = [name for name, each in self._ids.items() if not text.is_control(each)]
        longest_first = sorted(map(re.escape, always), key=len, reverse=True)
        self._always = re.compile("|".join(longest_first) or r"(?!)")

    def encode(self, parts: Sequence[PromptPart], *, add_bos: bool) -> list[int]:
        """See `backends.control_tokens.EncodesParts`.  Raises RequestError."""
        before, after = self._text.around if add_bos else ([], [])
        ids = list(before)
        for index, part in enumerate(parts):
            if part.is_control:
                ids.append(self._ids[part.text])
                continue
            text = part.text
            if index and self._text.strips(self._ids[parts[index - 1].text])[1]:
                text = text.lstrip(_BLANKS)
            if index + 1 < len(parts) and self._text.strips(self._ids[parts[index + 1].text])[0]:
                text = text.rstrip(_BLANKS)
            ids += self._plain(text)
        return [*ids, *after]

    def _plain(self, text: str) -> Iterator[int]:
        """Yield the tokens of text, cut within the names that llama.cpp always finds."""
        start = 0
        for found in self._always.finditer(text):
            cut = found.start() + 1
            yield from self._piece(text[start:cut], is_first=start == 0)
            start = cut
        if start < len(text):
            yield from self._piece(text[start:], is_first=start == 0)

    def _piece(self, text: str, *, is_first: bool) -> list[int]:
        def encode(piece: str) -> list[int]:
            return self._text.encode(piece, add_special=False, parse_special=False)

        if is_first or not self._text.is_sentence_piece:
            return encode(text)
        # The mark of a word, which begins every text, goes before a line's end that is cut off.
        lead = encode("\n")
        ids = encode(f"\n{text}")
        return ids[len(lead) :] if ids[: len(lead)] == lead else encode(text)


def added_texts(text: GgufTokenization) -> Mapping[str, bool]:
    """See `backends.control_tokens.EncodesParts.added_tokens`."""
    return {name: text.is_control(token_id) for name, token_id in text.added_ids.items()}
