"""Tokens to events: detokenizing, stop strings, limits and the hand-over to the output parser."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import replace

from backends.answer.parser import OutputParser, Piece
from backends.stepper import StepOutput
from core.types import (
    FinishReason,
    GenerationEvent,
    MismatchKind,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)


class Detokenizer:
    """Turns token ids into text, never emitting a broken character.

    Bytes that are certainly invalid become U+FFFD at once, an unfinished character at the end
    becomes one U+FFFD.
    """

    __slots__ = ("_pending", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token."""
        data = self._token_bytes(token_id)
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        """Return what an unfinished character at the end comes to."""
        text, _ = codecs.utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class StopMatcher:
    """Cuts text at the stop string that is complete first, however the text is split.

    Text is held back only while it may still become a stop string.
    """

    __slots__ = ("_characters", "_held", "_longest", "_stop", "is_matched", "matched")

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(string for string in stop if string)
        self._longest = max(map(len, self._stop), default=0)
        self._characters = frozenset("".join(self._stop))
        self._held = ""
        self.is_matched = False
        self.matched = ""

    def push(self, text: str) -> str:
        """Return the text that is certainly no part of a stop string."""
        if self.is_matched:
            return ""
        text = self._held + text
        found = [
            (start + len(string), start)
            for string in self._stop
            if (start := text.find(string)) >= 0
        ]
        if found:
            self.is_matched = True
            self._held = ""
            end, start = min(found)
            self.matched = text[start:end]
            return text[:start]
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the held text, which can no longer become a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        if not text or text[-1] not in self._characters:
            return 0
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[-length:]
            if any(len(string) > length and string.startswith(suffix) for string in self._stop):
                return length
        return 0


class TextAssembler:
    """Turns one sequence's step outputs into events; serves streaming and not streaming alike.

    Every generated token's id, an end token's too, is carried by exactly one event: tokens whose
    text is withheld travel with the next event, and those left at the end with an empty
    TextDelta.  Logprobs travel with TextDeltas only, and an end token has none.
    Stop strings are looked for in the raw text, reasoning and tool calls included.
    """

    __slots__ = (
        "_count",
        "_detokenizer",
        "_has_calls",
        "_ids",
        "_is_plain",
        "_logprobs",
        "_max_tokens",
        "_parser",
        "_reason",
        "_stop",
        "reasoning_tokens",
    )

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: Sequence[str],
        max_tokens: int,
        parser: OutputParser | None = None,
    ) -> None:
        self._detokenizer = Detokenizer(token_bytes)
        self._stop = StopMatcher(stop) if any(stop) else None
        self._max_tokens = max_tokens
        self._parser = parser
        self._is_plain = self._stop is None and parser is None
        self._count = 0
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._has_calls = False
        self.reasoning_tokens = 0
        self._reason: FinishReason | None = None if max_tokens > 0 else "length"

    @property
    def mismatches(self) -> tuple[MismatchKind, ...]:
        """What was wrong with the answer's tool calls."""
        return () if self._parser is None else tuple(self._parser.mismatches)

    @property
    def reason(self) -> FinishReason | None:
        """Why the sequence has ended, or None while it goes on."""
        return self._reason

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return (self._stop.matched or None) if self._stop is not None else None

    def push(self, output: StepOutput) -> list[GenerationEvent]:
        """Return the events of one step; nothing for prefill, nor once `reason` is set."""
        token_id = output.token_id
        if token_id is None or self._reason is not None:
            return []
        self._count += 1
        text = "" if output.is_end else self._detokenizer.push(token_id)
        if (
            self._is_plain
            and text
            and not output.is_end
            and self._count < self._max_tokens
            and not self._ids
        ):
            logprob = output.logprob
            return [TextDelta(text, (token_id,), () if logprob is None else (logprob,))]
        self._ids.append(token_id)
        if output.logprob is not None and not output.is_end:
            self._logprobs.append(output.logprob)
        pieces = self._split(text)
        if self._is_cut():
            pieces += self._end("stop", is_cut=True)
        elif output.is_end:
            pieces += self._end("stop")
        elif self._count >= self._max_tokens:
            pieces += self._end("length")
        return self._carry(pieces)

    def replay(self, token_ids: Sequence[int]) -> None:
        """Take an answer's first tokens, whose events were sent already.

        They must end with a token whose id an event carried: all that was certain by then was
        sent, and what was held back is held back again.
        """
        for token_id in token_ids:
            self.push(StepOutput(0, token_id))

    def finish(self, reason: FinishReason) -> list[GenerationEvent]:
        """End the sequence from outside, as at the context's end; return what was held back."""
        if self._reason is not None:
            return []
        return self._carry(self._end(reason))

    def _split(self, text: str) -> list[Piece]:
        if self._stop is not None:
            text = self._stop.push(text)
        return self._parse(text)

    def _parse(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._parser is None:
            return [TextDelta(text)]
        return self._noted(self._parser.push(text))

    def _noted(self, pieces: list[Piece]) -> list[Piece]:
        self._has_calls = self._has_calls or any(isinstance(p, ToolCallDelta) for p in pieces)
        return pieces

    def _is_cut(self) -> bool:
        if self._stop is not None and self._stop.is_matched:
            return True
        return self._parser is not None and self._parser.is_done

    def _end(self, reason: FinishReason, *, is_cut: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        if not is_cut:
            pieces += self._split(self._detokenizer.flush())
            if self._is_cut():
                reason = "stop"
            if self._stop is not None:
                pieces += self._parse(self._stop.flush())
        if self._parser is not None:
            pieces += self._noted(self._parser.flush())
        self._reason = "tool_calls" if reason == "stop" and self._has_calls else reason
        return pieces

    def _carry(self, pieces: list[Piece]) -> list[GenerationEvent]:
        """Hand the ids of all tokens since the last event to one of `pieces`."""
        if not pieces:
            if self._reason is None or not self._ids:
                return []
            pieces = [TextDelta("")]
        texts = [i for i, piece in enumerate(pieces) if isinstance(piece, TextDelta)]
        chosen = texts[-1] if texts else len(pieces) - 1
        piece, ids = pieces[chosen], tuple(self._ids)
        if isinstance(piece, TextDelta):
            pieces[chosen] = TextDelta(piece.text, ids, tuple(self._logprobs))
        else:
            pieces[chosen] = replace(piece, token_ids=ids)
            if isinstance(piece, ReasoningDelta):
                self.reasoning_tokens += len(ids)
        self._ids.clear()
        self._logprobs.clear()
        return list(pieces)
