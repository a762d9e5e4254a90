"""Formats events as the typed event stream of OpenAI's Responses API."""

import json
from collections.abc import Sequence

from core.errors import ImpetusError
from core.types import Finished, JsonValue, PrefillProgress, TextDelta
from router.answers.event_stream import StreamFormatter, prefill_comment
from router.answers.logprobs import event_logprobs
from router.answers.parts import Closed, Extended, Opened, Part, PartAssembler, PartStep
from router.answers.valid_events import TaggedEvent
from router.context import RequestRecord
from router.http.errors import shown_message
from router.requests.custom_input import CustomInput, to_custom_input
from router.v1.responses.object import ResponseBuilder, final_status

_NAMES = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}

_dumps = json.JSONEncoder(separators=(",", ":")).encode


class ResponseEvents(StreamFormatter):
    """Emits the response, each item with all its steps, and the final response."""

    def __init__(self, builder: ResponseBuilder) -> None:
        super().__init__(builder.generation)
        self._builder = builder
        self._assembler = PartAssembler(keeps_empty=True)
        self._has_logprobs = builder.body.logprob_count is not None
        self._number = 0
        self._text_head = ""
        self._custom_input = CustomInput()

    def beginning(self, events: Sequence[TaggedEvent]) -> str:
        """Return the response before its first item."""
        del events
        response: JsonValue = self._builder.in_progress()
        names = ("response.created", "response.in_progress")
        return "".join(self._event(name, {"response": response}) for name in names)

    def chunks(self, events: Sequence[TaggedEvent]) -> str:
        """Return the SSE text of `events`; a text delta, the common case, is one concatenation."""
        texts: list[str] = []
        for index, event in events:
            part = self._assembler.current
            if (
                type(event) is TextDelta
                and part is not None
                and part.kind == "text"
                and not self._has_logprobs
            ):
                if event.text:
                    part.pieces.append(event.text)
                    texts.append(self._text_head)
                    texts.append(f'{_dumps(event.text)},"sequence_number":{self._number}}}\n\n')
                    self._number += 1
            elif isinstance(event, PrefillProgress):
                texts.append(prefill_comment(event))
            else:
                if isinstance(event, Finished):
                    self._generation.note_finished(index, event)
                for step in self._assembler.push(event):
                    texts.extend(self._step_events(step))
        return "".join(texts)

    def closing(self) -> str:
        """Return the final response; this also stores it."""
        response: JsonValue = self._builder.finished(self._assembler)
        return self._event(
            f"response.{final_status(self._assembler.finished)}", {"response": response}
        )

    def failing(self, error: ImpetusError, record: RequestRecord) -> str:
        """Return the error, and the response as failed."""
        del record
        error_event = self._event(
            "error", {"code": error.code, "message": shown_message(error), "param": error.param}
        )
        response: JsonValue = self._builder.failed(self._assembler.parts, error)
        return error_event + self._event("response.failed", {"response": response})

    def _step_events(self, step: PartStep) -> list[str]:
        match step:
            case Opened(part):
                return self._open(part)
            case Extended(part, text) if self._builder.is_custom(part):
                return self._custom_delta(part, self._custom_input.push(text))
            case Extended(part, text, logprobs):
                fields: dict[str, JsonValue] = {**self._place(part), "delta": text}
                if part.kind == "text":
                    fields["logprobs"] = event_logprobs(logprobs) if self._has_logprobs else []
                return [self._event(f"response.{_NAMES[part.kind]}.delta", fields)]
            case Closed(part):
                return self._close(part)

    def _custom_delta(self, part: Part, text: str) -> list[str]:
        if not text:
            return []
        fields = {**self._place(part), "delta": text}
        return [self._event("response.custom_tool_call_input.delta", fields)]

    def _open(self, part: Part) -> list[str]:
        self._custom_input = CustomInput()
        item: JsonValue = self._builder.item(part, "in_progress")
        added = {"output_index": part.index, "item": item}
        events = [self._event("response.output_item.added", added)]
        if part.kind != "call":
            content: JsonValue = self._builder.content(part, is_empty=True)
            fields = {**self._place(part), "part": content}
            events.append(self._event("response.content_part.added", fields))
        if part.kind == "text":
            name = "response.output_text.delta"
            head = _dumps({"type": name, **self._place(part), "logprobs": []})
            self._text_head = f'event: {name}\ndata: {head[:-1]},"delta":'
        return events

    def _close(self, part: Part) -> list[str]:
        place = self._place(part)
        if self._builder.is_custom(part):
            return self._close_custom(part, place)
        fields: dict[str, JsonValue] = {**place, "text": part.text}
        content: dict[str, JsonValue] = {}
        if part.kind == "call":
            name = self._builder.offered.origin(part.name).name
            fields = {**place, "name": name, "arguments": part.text}
        else:
            content = self._builder.content(part)
        if part.kind == "text":
            fields["logprobs"] = event_logprobs(part.logprobs) if self._has_logprobs else []
        events = [self._event(f"response.{_NAMES[part.kind]}.done", fields)]
        if content:
            events.append(self._event("response.content_part.done", {**place, "part": content}))
        return [*events, self._item_done(part)]

    def _close_custom(self, part: Part, place: dict[str, JsonValue]) -> list[str]:
        text = to_custom_input(part.text)
        # Arguments of another form have no text before they are complete.
        rest = self._custom_input.finish() if self._custom_input.has_begun else text
        return [
            *self._custom_delta(part, rest),
            self._event("response.custom_tool_call_input.done", {**place, "input": text}),
            self._item_done(part),
        ]

    def _item_done(self, part: Part) -> str:
        item: JsonValue = self._builder.item(part, final_status(self._assembler.finished))
        done = {"output_index": part.index, "item": item}
        return self._event("response.output_item.done", done)

    def _place(self, part: Part) -> dict[str, JsonValue]:
        place: dict[str, JsonValue] = {
            "item_id": self._builder.item_id(part),
            "output_index": part.index,
        }
        return place if part.kind == "call" else {**place, "content_index": 0}

    def _event(self, name: str, fields: dict[str, JsonValue]) -> str:
        data = {"type": name, **fields, "sequence_number": self._number}
        self._number += 1
        return f"event: {name}\ndata: {_dumps(data)}\n\n"
