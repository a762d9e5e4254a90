"""Formats events as the typed event stream of Anthropic's Messages API."""

import json
from collections.abc import Callable, Sequence

from core.errors import ImpetusError
from core.types import Finished, JsonValue, PrefillProgress, TextDelta, Usage
from router.answers.event_stream import StreamFormatter, prefill_comment
from router.answers.generation import Generation
from router.answers.parts import Closed, Extended, Opened, Part, PartAssembler, PartStep
from router.answers.valid_events import TaggedEvent
from router.context import RequestRecord
from router.http.errors import anthropic_error_body
from router.v1.messages import answer
from router.v1.messages.compaction import compaction_block, compaction_ending, is_of_summary
from router.v1.messages.request import MessagesRequest

_dumps = json.JSONEncoder(separators=(",", ":")).encode


class MessageEvents(StreamFormatter):
    """Emits `message_start`, the content blocks in order, `message_delta`, `message_stop`."""

    keep_alive = 'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(
        self,
        generation: Generation,
        message_id: str,
        body: MessagesRequest,
        keep: Callable[[Sequence[Part]], None],
    ) -> None:
        """`keep` is called with the parts of a complete answer."""
        super().__init__(generation)
        self._keep = keep
        self._only_warms = body.only_warms
        self._compacts = body.compaction is not None
        self._message_id = message_id
        self._stop_sequences = body.stop_sequences
        self._hides_thinking = body.hides_thinking
        self._assembler = PartAssembler(keeps_empty=False)
        self._text_head = ""

    def beginning(self, events: Sequence[TaggedEvent]) -> str:
        """Return the message without content.

        Its input tokens are the prompt's if prefill has reported them, else 0; `message_delta` has
        the exact number.
        """
        totals = [event.total_tokens for _, event in events if isinstance(event, PrefillProgress)]
        message = answer.message(
            self._message_id,
            self._generation.view.id,
            (),
            answer.message_usage(Usage(max(totals, default=0), 0)),
            answer.ending(None, ()),
        )
        return _event({"type": "message_start", "message": message})

    def chunks(self, events: Sequence[TaggedEvent]) -> str:
        """Return the SSE text of `events`; a text delta, the common case, is one concatenation."""
        texts: list[str] = []
        for index, given in events:
            event = answer.warmed(given) if self._only_warms else given
            part = self._assembler.current
            if self._compacts and event is not None and not is_of_summary(event):
                continue
            if self._compacts and type(event) is TextDelta:
                # Clients replace a summary by each delta, so it is sent whole.
                self._assembler.push(event)
            elif type(event) is TextDelta and part is not None and part.kind == "text":
                if event.text:
                    texts.append(f"{self._text_head}{_dumps(event.text)}}}}}\n\n")
            elif event is None:
                continue
            elif isinstance(event, PrefillProgress):
                texts.append(prefill_comment(event))
            else:
                if isinstance(given, Finished):
                    self._generation.note_finished(index, given)
                steps = self._assembler.push(event)
                if not self._compacts:
                    texts.extend(map(self._step_text, steps))
        return "".join(texts)

    def closing(self) -> str:
        """Return the stop reason, the usage, and the end."""
        finished = self._assembler.finished
        assert finished is not None
        self._keep(self._assembler.parts)
        ending = answer.ending(finished, self._stop_sequences)
        summary = ""
        if self._compacts:
            ending, summary = compaction_ending(ending), self._summary()
        delta: JsonValue = ending
        usage = answer.usage(finished.usage)
        end = _event({"type": "message_delta", "delta": delta, "usage": usage})
        return summary + end + _event({"type": "message_stop"})

    def _summary(self) -> str:
        """Return the one block of a summary."""
        block = compaction_block(self._assembler.parts)
        begun: JsonValue = {**block, "content": None}
        start: dict[str, JsonValue] = {
            "type": "content_block_start",
            "index": 0,
            "content_block": begun,
        }
        delta: JsonValue = {**block, "type": "compaction_delta"}
        return _event(start) + _delta(0, delta) + _event({"type": "content_block_stop", "index": 0})

    def failing(self, error: ImpetusError, record: RequestRecord) -> str:
        """Return the error as the last event."""
        return f"event: error\ndata: {anthropic_error_body(error, record).decode('ascii')}\n\n"

    def _step_text(self, step: PartStep) -> str:
        index = step.part.index
        match step:
            case Opened(part):
                self._text_head = _delta(index, {"type": "text_delta", "text": ""})[
                    : -len('""}}\n\n')
                ]
                return _event(
                    {"type": "content_block_start", "index": index, "content_block": _empty(part)}
                )
            case Extended(part, text):
                return self._delta(part, text)
            case Closed(part):
                end = _event({"type": "content_block_stop", "index": index})
                if part.kind != "reasoning":
                    return end
                signature = answer.signature(part, hides_thinking=self._hides_thinking)
                return _delta(index, {"type": "signature_delta", "signature": signature}) + end

    def _delta(self, part: Part, text: str) -> str:
        match part.kind:
            case "text":
                return _delta(part.index, {"type": "text_delta", "text": text})
            case "call":
                return _delta(part.index, {"type": "input_json_delta", "partial_json": text})
            case "reasoning":
                if self._hides_thinking:
                    return ""
                return _delta(part.index, {"type": "thinking_delta", "thinking": text})


def _empty(part: Part) -> JsonValue:
    """Return the block before its first delta."""
    match part.kind:
        case "text":
            return answer.text_block("")
        case "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "call":
            return answer.call_block(part, {})


def _delta(index: int, delta: JsonValue) -> str:
    return _event({"type": "content_block_delta", "index": index, "delta": delta})


def _event(data: dict[str, JsonValue]) -> str:
    return f"event: {data['type']}\ndata: {_dumps(data)}\n\n"
