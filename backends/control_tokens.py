"""What a tokenizer offers so that control tokens' names in a text stay text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Text that has no control tokens; with `is_control`, the name of exactly one."""

    text: str
    is_control: bool = False


@runtime_checkable
class EncodesParts(Protocol):
    """A tokenizer that takes markup and text apart.  Thread-safe."""

    def added_tokens(self) -> Mapping[str, bool]:
        """Return the texts that are one token wherever they stand, and whether it is special.

        May block for some 100 ms the first time.
        """
        ...

    def encode_parts(
        self, parts: Sequence[PromptPart], names: frozenset[str], *, add_bos: bool
    ) -> list[int]:
        """Return the token ids of the joined parts; `names` are all control tokens' names.

        In the text parts none of `names` becomes its token; all else is as if the joined text had
        been encoded with `parse_special`.  Blocks for a second the first time.  Raises
        RequestError.
        """
        ...
