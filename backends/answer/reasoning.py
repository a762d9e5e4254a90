"""Separates reasoning from the answer, and maps reasoning effort to template variables."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backends.answer.parser import OutputParser, Piece
from core.types import JsonValue, MismatchKind, ReasoningDelta, TextDelta

_EFFORT = re.compile(r"\breasoning_effort\b")
_SWITCHES = {
    "enable_thinking": re.compile(r"\benable_thinking\b"),
    "thinking": re.compile(r"\b(?:if|not|and|or)\s+thinking\b|\bthinking\s+is\s+defined\b"),
}
_COMMON = ("low", "medium", "high")
_NEAREST = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around a model's reasoning; `forced` is the text that ends it at a budget."""

    open: str
    close: str
    forced: str = ""


THINK = ReasoningTags("<think>", "</think>")
# Harmony's parser reads the channels itself.
HARMONY = ReasoningTags(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
)
_KNOWN = (
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningTags("<|channel>thought", "<channel|>"),
    ReasoningTags("◁think▷", "◁/think▷"),
    THINK,
)


def reasoning_tags(template: str) -> ReasoningTags | None:
    """Return the reasoning tags in a chat template, or None for a model that does not reason."""
    for tags in _KNOWN:
        if tags.open in template or tags.close in template:
            return tags
    return None


def _partial_length(text: str, marker: str) -> int:
    """Return how many characters at the end of `text` may start `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class ReasoningParser:
    """Parses reasoning between tags at the start of the answer; passes the rest to `inner`.

    `is_open`: the prompt already ends with the opening tag.  Unclosed reasoning stays reasoning.
    Whitespace around both tags is dropped.
    """

    def __init__(
        self, inner: OutputParser | None, *, is_open: bool, tags: ReasoningTags = THINK
    ) -> None:
        self._inner = inner
        self._tags = tags
        # Whitespace, dropped if a tag follows, and what may be the beginning of the tag.
        self._spaces: list[str] = []
        self._held = ""
        self._is_after = False
        self._is_fresh = True
        self._state: Callable[[str, list[Piece]], str] = self._think if is_open else self._start

    @property
    def is_done(self) -> bool:
        """Whether the inner parser is done."""
        return self._inner is not None and self._inner.is_done

    @property
    def mismatches(self) -> Sequence[MismatchKind]:
        """Problems with the inner parser's calls so far."""
        return () if self._inner is None else self._inner.mismatches

    def push(self, text: str) -> list[Piece]:
        """Parse the next text; return the pieces that are certain by now."""
        pieces: list[Piece] = []
        while text:
            text = self._state(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """End the text; return the pieces that were held back."""
        pieces: list[Piece] = []
        held, self._held = self._taken_spaces() + self._held, ""
        if self._state == self._think:
            if held.strip():
                pieces.append(ReasoningDelta(held))
        elif not self._is_after or held.strip():
            self._answer(held, pieces)
        if self._inner is not None:
            pieces += self._inner.flush()
        return pieces

    def _taken_spaces(self) -> str:
        spaces = "".join(self._spaces)
        self._spaces.clear()
        return spaces

    def _start(self, text: str, pieces: list[Piece]) -> str:
        begin = self._held + text if self._held else text.lstrip()
        if not self._held:
            self._spaces.append(text[: len(text) - len(begin)])
        self._held = ""
        if begin.startswith(self._tags.open):
            self._spaces.clear()
            self._state, self._is_fresh = self._think, True
            return begin[len(self._tags.open) :]
        if self._tags.open.startswith(begin):
            self._held = begin
            return ""
        spaces = self._taken_spaces()
        self._state = self._answer
        return self._answer(begin if self._is_after else spaces + begin, pieces)

    def _think(self, text: str, pieces: list[Piece]) -> str:
        text, self._held = self._held + text, ""
        if self._is_fresh:
            text = text.lstrip()
        before, tag, after = text.partition(self._tags.close)
        if not tag:
            length = len(text) - _partial_length(text, self._tags.close)
            before, self._held = text[:length], text[length:]
        thought = before.rstrip()
        if thought:
            self._is_fresh = False
            pieces.append(ReasoningDelta(self._taken_spaces() + thought))
        self._spaces.append(before[len(thought) :])
        if tag:
            self._spaces.clear()
            self._state, self._is_after = self._start, True
        return after

    def _answer(self, text: str, pieces: list[Piece]) -> str:
        if self._inner is not None:
            pieces += self._inner.push(text)
        elif text:
            pieces.append(TextDelta(text))
        return ""


def effort_variables(template: str, effort: str | None) -> Mapping[str, JsonValue]:
    """Return the template variables for `effort`, which is a hint; none if the template has none.

    A template that reads `reasoning_effort` gets it; levels that it does not name become the
    nearest of low, medium and high.  A template that can only switch reasoning is switched.
    """
    if effort is None:
        return {}
    reads_effort = _EFFORT.search(template) is not None
    is_named = re.search(rf"['\"]{re.escape(effort)}['\"]", template) is not None
    if reads_effort and (effort in _COMMON or is_named):
        return {"reasoning_effort": effort}
    for name, pattern in _SWITCHES.items():
        if pattern.search(template):
            variables: dict[str, JsonValue] = {name: effort != "none"}
            if reads_effort and effort in _NEAREST and effort != "none":
                variables["reasoning_effort"] = _NEAREST[effort]
            return variables
    return {"reasoning_effort": _NEAREST[effort]} if reads_effort and effort in _NEAREST else {}
