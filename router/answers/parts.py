"""Assembles events into the parts of an answer in order: text, reasoning, tool calls.

Streamed and whole answers of the APIs that answer in parts use one state machine, so the two cannot
differ.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from core.types import (
    Finished,
    GenerationEvent,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)

PartKind: TypeAlias = Literal["text", "reasoning", "call"]


@dataclass(slots=True, eq=False)
class Part:
    """One part; `text` of a call is its arguments, and `call` its number among the calls."""

    kind: PartKind
    index: int
    call: int | None = None
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Opened:
    """A new part started."""

    part: Part


@dataclass(frozen=True, slots=True)
class Extended:
    """Text was added to a part."""

    part: Part
    text: str
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """A part is complete."""

    part: Part


PartStep: TypeAlias = Opened | Extended | Closed


class PartAssembler:
    """Collects one answer's parts.

    Leading white space of a text or reasoning is held back until other text follows, and dropped
    if none does.  With `keeps_empty`, an empty answer is one text.
    """

    def __init__(self, *, keeps_empty: bool) -> None:
        self._keeps_empty = keeps_empty
        self._pending: list[TextDelta | ReasoningDelta] = []
        self._calls: set[int] = set()
        self.parts: list[Part] = []
        self.current: Part | None = None
        self.finished: Finished | None = None

    def push(self, event: GenerationEvent) -> list[PartStep]:
        """Return the changes that `event` makes; `Finished` closes the open part."""
        match event:
            case TextDelta():
                return self._write("text", event)
            case ReasoningDelta():
                return self._write("reasoning", event)
            case ToolCallDelta():
                return self._call(event)
            case Finished():
                return self._end(event)
            case PrefillProgress():
                return []

    def push_all(self, events: Iterable[GenerationEvent]) -> list[Part]:
        """Return the parts of a whole answer."""
        for event in events:
            self.push(event)
        return self.parts

    def _write(self, kind: PartKind, event: TextDelta | ReasoningDelta) -> list[PartStep]:
        if self.current is not None and self.current.kind == kind:
            return self._extend(self.current, [event])
        if self._pending and type(self._pending[0]) is not type(event):
            self._pending.clear()
        self._pending.append(event)
        if not event.text.strip():
            return []
        steps = self._open(Part(kind, len(self.parts)))
        held, self._pending = self._pending, []
        return [*steps, *self._extend(self.parts[-1], held)]

    def _call(self, event: ToolCallDelta) -> list[PartStep]:
        steps: list[PartStep] = []
        self._pending.clear()
        if self.current is None or self.current.call != event.index:
            if event.index in self._calls:
                # Closed parts were sent; no parser goes back to an earlier call.
                return steps
            self._calls.add(event.index)
            part = Part("call", len(self.parts), event.index, event.id or "", event.name or "")
            steps = self._open(part)
        if event.arguments:
            self.parts[-1].pieces.append(event.arguments)
            steps.append(Extended(self.parts[-1], event.arguments))
        return steps

    def _end(self, event: Finished) -> list[PartStep]:
        self.finished = event
        if not self.parts and self._keeps_empty:
            steps = self._open(Part("text", 0))
            texts = [held for held in self._pending if isinstance(held, TextDelta)]
            return [*steps, *self._extend(self.parts[0], texts), *self._close()]
        return self._close()

    def _open(self, part: Part) -> list[PartStep]:
        steps = self._close()
        self.parts.append(part)
        self.current = part
        return [*steps, Opened(part)]

    def _close(self) -> list[PartStep]:
        part, self.current = self.current, None
        return [] if part is None else [Closed(part)]

    @staticmethod
    def _extend(part: Part, events: Sequence[TextDelta | ReasoningDelta]) -> list[PartStep]:
        text = "".join(event.text for event in events)
        logprobs = [
            token for event in events if isinstance(event, TextDelta) for token in event.logprobs
        ]
        if not (text or logprobs):
            return []
        part.pieces.append(text)
        part.logprobs += logprobs
        return [Extended(part, text, logprobs)]
