"""Formats the streamed chunks of OpenAI's chat completions and completions."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from core.errors import ImpetusError
from core.types import Finished, GenerationEvent, JsonValue, PrefillProgress, TextDelta
from router.answers.event_stream import StreamFormatter, prefill_comment
from router.answers.generation import Generation
from router.answers.valid_events import TaggedEvent
from router.context import RequestRecord
from router.http.errors import error_body

DONE = "data: [DONE]\n\n"
_MARK = "\0text\0"

_dumps = json.JSONEncoder(separators=(",", ":")).encode


class ChunkFormatter(StreamFormatter):
    """Formats events as SSE text; a plain text delta, the common case, is one concatenation."""

    def __init__(
        self,
        generation: Generation,
        base: dict[str, Any],
        *,
        includes_usage: bool,
        has_logprobs: bool,
        has_timings: bool,
    ) -> None:
        """With `has_timings` the last chunk has `timings` as in llama.cpp's streams."""
        super().__init__(generation)
        self._base = {**base, "usage": None} if includes_usage else base
        self._includes_usage = includes_usage
        self._has_logprobs = has_logprobs
        self._has_timings = has_timings
        self._opened: set[int] = set()
        self._frames: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def choices(self, index: int, event: GenerationEvent) -> Iterable[dict[str, JsonValue]]:
        """Return the choice objects for `event`, possibly none."""

    def opening(self, index: int) -> Iterable[dict[str, JsonValue]]:
        """Return the choice objects sent before a choice's first event."""
        del index
        return ()

    def note_prefill(self, index: int, event: PrefillProgress) -> None:
        """Take what the prompt's computation tells of a choice."""
        del index, event

    def chunks(self, events: Sequence[TaggedEvent]) -> str:
        """Return the SSE text of `events`."""
        parts: list[str] = []
        for index, event in events:
            frame = self._frames.get(index)
            if frame is None or type(event) is not TextDelta:
                parts.append(self._uncommon(index, event))
            elif event.text:
                parts.append(f"{frame[0]}{_dumps(event.text)}{frame[1]}")
        return "".join(parts)

    def closing(self) -> str:
        """Return the usage chunk, if requested, and `[DONE]`."""
        if not self._includes_usage:
            return DONE
        usage = self._generation.usage().model_dump(mode="json", exclude_unset=True)
        last = {**self._base, "usage": usage, "timing": self._generation.timing()}
        if self._has_timings:
            last["timings"] = self._generation.llama_timings()
        return f"data: {_dumps(last)}\n\n{DONE}"

    def failing(self, error: ImpetusError, record: RequestRecord) -> str:
        """Return the error envelope as data, and `[DONE]`."""
        del record
        return f"data: {error_body(error).decode('ascii')}\n\n{DONE}"

    def _uncommon(self, index: int, event: GenerationEvent) -> str:
        if isinstance(event, PrefillProgress):
            self.note_prefill(index, event)
            return prefill_comment(event)
        added: dict[str, JsonValue] = {}
        if isinstance(event, Finished):
            self._generation.note_finished(index, event)
            if self._has_timings and not self._includes_usage and self._generation.is_finished:
                added["timings"] = self._generation.llama_timings()
        text = ""
        if index not in self._opened:
            self._opened.add(index)
            text = "".join(map(self._chunk, self.opening(index)))
            if not self._has_logprobs:
                (choice,) = self.choices(index, TextDelta(_MARK))
                prefix, suffix = self._chunk(choice).split(_dumps(_MARK))
                self._frames[index] = (prefix, suffix)
        chunks = (self._chunk(choice, added) for choice in self.choices(index, event))
        return text + "".join(chunks)

    def _chunk(
        self, choice: dict[str, JsonValue], added: Mapping[str, JsonValue] = MappingProxyType({})
    ) -> str:
        return f"data: {_dumps({**self._base, 'choices': [choice], **added})}\n\n"
