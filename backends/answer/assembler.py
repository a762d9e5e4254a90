"""Turns tokens into events: detokenization, stop strings, length limits and output parsing."""

import codecs
from collections.abc import Callable, Collection, Sequence
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
    """Incremental detokenizer that never emits part of a UTF-8 character.

    Invalid bytes become U+FFFD at once; an incomplete character at the end becomes one U+FFFD.
    """

    __slots__ = ("_pending", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        data = self._token_bytes(token_id)
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        """Return the replacement of an incomplete character at the end, if any."""
        text, _ = codecs.utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class StopMatcher:
    """Truncates streamed text at the first complete stop string.

    Text is held back only while it may become a stop string.
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
        """Return the text that cannot be part of a stop string."""
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
        """Return the text held back; the text ends here."""
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
    """Turns one sequence's step outputs into events, for streamed and complete answers.

    Each generated token's id, including an end token's, is in exactly one event: ids of tokens
    whose text is held back are in the next event, remaining ones at the end in an empty TextDelta.
    Only TextDeltas have logprobs; an end token has none, unless `lists_end`: then without bytes.
    Stop strings are matched in the raw text, including reasoning and tool calls.
    """

    __slots__ = (
        "_count",
        "_detokenizer",
        "_end_ids",
        "_has_calls",
        "_ids",
        "_is_plain",
        "_lists_end",
        "_logprobs",
        "_max_tokens",
        "_min_tokens",
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
        *,
        end_ids: Collection[int] = (),
        min_tokens: int = 0,
        lists_end: bool = False,
    ) -> None:
        """`end_ids` end the answer besides the model's end tokens.

        Stop strings are looked for in the text of tokens after the first `min_tokens`.
        """
        self._end_ids = frozenset(end_ids) or None
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(token_bytes)
        self._stop = StopMatcher(stop) if any(stop) else None
        self._max_tokens = max_tokens
        self._parser = parser
        self._lists_end = lists_end
        self._is_plain = self._stop is None and parser is None
        self._count = 0
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._has_calls = False
        self.reasoning_tokens = 0
        self._reason: FinishReason | None = None if max_tokens > 0 else "length"

    @property
    def mismatches(self) -> tuple[MismatchKind, ...]:
        """Problems with the answer's tool calls."""
        return () if self._parser is None else tuple(self._parser.mismatches)

    @property
    def reason(self) -> FinishReason | None:
        """Why the sequence ended, or None while it continues."""
        return self._reason

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if any."""
        return (self._stop.matched or None) if self._stop is not None else None

    def push(self, output: StepOutput) -> list[GenerationEvent]:
        """Return the events of one step; none during prefill or once `reason` is set."""
        token_id = output.token_id
        if token_id is None or self._reason is not None:
            return []
        self._count += 1
        if self._end_ids is not None and token_id in self._end_ids:
            output = replace(output, is_end=True)
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
        if output.logprob is not None:
            if not output.is_end:
                self._logprobs.append(output.logprob)
            elif self._lists_end:
                self._logprobs.append(replace(output.logprob, data=b""))
        pieces = self._split(text)
        if self._is_cut():
            pieces += self._end("stop", is_cut=True)
        elif output.is_end:
            pieces += self._end("stop")
        elif self._count >= self._max_tokens:
            pieces += self._end("length")
        return self._with_ids(pieces)

    def replay(self, token_ids: Sequence[int]) -> None:
        """Process the first tokens of a resumed answer, whose events were already sent.

        They must end with the last token id of an event: text that was held back at that point is
        then held back again.
        """
        for token_id in token_ids:
            self.push(StepOutput(0, token_id))

    def finish(self, reason: FinishReason) -> list[GenerationEvent]:
        """End the sequence for an external reason, as a full context; return pending events."""
        if self._reason is not None:
            return []
        return self._with_ids(self._end(reason))

    def _split(self, text: str) -> list[Piece]:
        if self._stop is not None and self._count > self._min_tokens:
            text = self._stop.push(text)
        return self._parse(text)

    def _parse(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._parser is None:
            return [TextDelta(text)]
        return self._recorded(self._parser.push(text))

    def _recorded(self, pieces: list[Piece]) -> list[Piece]:
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
            pieces += self._recorded(self._parser.flush())
        self._reason = "tool_calls" if reason == "stop" and self._has_calls else reason
        return pieces

    def _with_ids(self, pieces: list[Piece]) -> list[GenerationEvent]:
        """Attach the ids of all tokens since the last event to one of `pieces`."""
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
