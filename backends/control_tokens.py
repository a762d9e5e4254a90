"""What a tokenizer offers so that control tokens' names in a text stay text."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

_PIPE_NAME = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_BRACKETS = ("<>", "[]", "{}")


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


def control_names(
    tokens: Mapping[str, bool], markup: str = "", markers: Collection[str] = ()
) -> frozenset[str]:
    """Choose control tokens among `tokens`: the texts of added tokens, and which are special.

    Of the others, such as Gemma's `<table>`, only those count that are in `markers` or, in
    brackets, in `markup`, or that look like `<|this|>`.
    """
    return frozenset(
        name
        for name, is_special in tokens.items()
        if name.strip()
        and (is_special or name in markers or _PIPE_NAME.fullmatch(name) or _is_in(name, markup))
    )


def is_bracketed(name: str) -> bool:
    """Whether a name is in brackets."""
    return (name[0] + name[-1]) in _BRACKETS


def _is_in(name: str, markup: str) -> bool:
    return len(name) > 1 and is_bracketed(name) and name in markup


def markup_parts(pieces: Iterable[tuple[str, bool]], pattern: re.Pattern[str]) -> list[PromptPart]:
    """Return the parts of joined pieces, each with whether it is the server's own markup.

    `pattern` finds names, which are control tokens in markup only.
    """
    parts: list[PromptPart] = []
    text = ""
    for piece, is_markup in pieces:
        start = 0
        for found in pattern.finditer(piece) if is_markup else ():
            text += piece[start : found.start()]
            parts += [PromptPart(text)] if text else []
            parts.append(PromptPart(found.group(), is_control=True))
            text, start = "", found.end()
        text += piece[start:]
    return [*parts, PromptPart(text)] if text else parts


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of literal texts; those with the same two first characters in one branch."""
    heads: dict[str, dict[str, list[str]]] = {}
    for text in texts:
        heads.setdefault(text[0], {}).setdefault(text[1:2], []).append(text[2:])
    branches = []
    for head, seconds in sorted(heads.items()):
        inner = [
            re.escape(second) + _branch(sorted(ends, key=lambda end: (-len(end), end)))
            for second, ends in sorted(seconds.items(), reverse=True)
        ]
        branches.append(re.escape(head) + _group(inner))
    return re.compile("|".join(branches) or r"(?!)")


def _branch(ends: Sequence[str]) -> str:
    return _group([re.escape(end) for end in ends])


def _group(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
