"""Encodes prompts with `tokenizers` so that control tokens' names in texts stay text."""

import json
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from backends.control_tokens import PromptPart, any_of
from core.errors import is_panic

logger = logging.getLogger(__name__)

Encode = Callable[[Any, str], list[int]]


class ControlIds:
    """The control tokens of a vocabulary, to find those that a text became."""

    def __init__(
        self, names: frozenset[str], id_of: Callable[[str], int | None], unknown: str | None
    ) -> None:
        """`unknown` is the name of the token for characters that the vocabulary lacks."""
        self.names = names
        self.pattern = any_of(names)
        self._unknown = unknown if unknown in names else None
        ids = {id_of(name) for name in names if name != unknown}
        self._ids = frozenset(each for each in ids if each is not None)

    def may_be_in(self, token_ids: Sequence[int], text: str) -> bool:
        """Whether a name in `text`, or what its normal form is, may be among its tokens."""
        if not self._ids.isdisjoint(token_ids):
            return True
        # Its token stands for other characters as well.
        return self._unknown is not None and self._unknown in text


class PartEncoder:
    """A second tokenizer in which the control tokens have names that no text can contain.

    All else is as in the first one: normalizer, blanks that tokens take with them, and the marks
    of words.  So a prompt is encoded at once, and its texts as the model was trained on them.
    """

    def __init__(self, tokenizer: Any, names: frozenset[str], encode: Encode) -> None:
        """Copy the tokenizer; blocks for about a second.  Falls back to it if that fails."""
        self._encode = encode
        # Random, so that no request can write one.
        secret = secrets.token_hex(16)
        self._aliases = {name: f"<{secret}:{at}>" for at, name in enumerate(sorted(names))}
        self._tokenizer = tokenizer
        try:
            renamed = _renamed(tokenizer, self._aliases)
            is_same = all(
                encode(renamed, alias) == encode(tokenizer, name)
                for name, alias in self._aliases.items()
            )
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            logger.warning("The tokenizer's control tokens cannot be renamed: %s", error)
            is_same = False
        if is_same:
            self._tokenizer = renamed
        else:
            self._aliases = {}

    def encode(self, parts: Sequence[PromptPart]) -> list[int]:
        """Return the ids of the joined parts, without tokens around them.  Raises RequestError."""
        texts = (
            self._aliases.get(part.text, part.text) if part.is_control else part.text
            for part in parts
        )
        return self._encode(self._tokenizer, "".join(texts))


def _renamed(tokenizer: Any, aliases: dict[str, str]) -> Any:
    """Return a copy of the tokenizer with other names for these added tokens, and the same ids."""
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.to_str())
    description["post_processor"] = None
    for token in description["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = description["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {aliases.get(piece, piece): at for piece, at in vocabulary.items()}
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    if "merges" in model and not aliases.keys().isdisjoint(vocabulary):
        model["merges"] = [each for each in model["merges"] if not _makes(each, aliases)]
    return Tokenizer.from_str(json.dumps(description))


def _makes(merge: Any, names: dict[str, str]) -> bool:
    """Whether a merge of byte pairs reads or writes one of the names."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(parts) in names or any(part in names for part in parts)
