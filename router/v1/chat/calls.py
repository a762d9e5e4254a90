"""Shows tool calls in a chat's answers: of functions, of custom tools, and in the older form."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from core.types import FinishReason, GenerationEvent, JsonValue, ToolCallDelta
from router.requests.custom_input import CustomInput, to_custom_input
from router.v1.chat.request import ChatRequest


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a request wants calls: `custom_names` as text, `is_older` as one `function_call`."""

    custom_names: frozenset[str] = frozenset()
    is_older: bool = False

    @classmethod
    def of(cls, body: ChatRequest) -> "CallForm":
        """Return the form of a request's tools."""
        return cls(body.custom_names, bool(body.functions))

    def reason(self, reason: FinishReason) -> str:
        """Return why an answer ended, in the words of the form."""
        return "function_call" if self.is_older and reason == "tool_calls" else reason

    def fields(self, calls: Mapping[int, Sequence[ToolCallDelta]]) -> dict[str, JsonValue]:
        """Return a message's fields with the calls of a whole answer."""
        if not calls:
            return {}
        if self.is_older:
            return {"function_call": _function(calls[min(calls)])}
        return {"tool_calls": [self._call(deltas) for _, deltas in sorted(calls.items())]}

    def _call(self, deltas: Sequence[ToolCallDelta]) -> JsonValue:
        call_id = next((delta.id for delta in deltas if delta.id), "")
        if _name(deltas) in self.custom_names:
            return {"id": call_id, "type": "custom", "custom": _custom(deltas)}
        return {"id": call_id, "type": "function", "function": _function(deltas)}


@dataclass(slots=True)
class _CustomCall:
    """The call of a custom tool that is being written; `sent` counts its text's characters."""

    index: int
    arguments: list[str] = field(default_factory=list)
    text: CustomInput = field(default_factory=CustomInput)
    sent: int = 0


@dataclass(slots=True)
class CallChunks:
    """Turns one choice's call events into deltas; the text of a custom tool comes as it is written.

    What of a text is only known once its arguments are complete comes with the next event.
    """

    form: CallForm
    _custom: _CustomCall | None = None
    _first: int | None = None

    def deltas(self, event: GenerationEvent) -> Iterator[dict[str, JsonValue]]:
        """Yield the deltas of calls before or in `event`."""
        custom = self._custom
        index = event.index if isinstance(event, ToolCallDelta) else None
        if custom is not None and index != custom.index:
            yield from self._finished(custom)
        if isinstance(event, ToolCallDelta):
            yield from self._call(event)

    def _call(self, event: ToolCallDelta) -> Iterator[dict[str, JsonValue]]:
        if self._custom is None and event.name in self.form.custom_names:
            self._custom = _CustomCall(event.index)
            custom: JsonValue = {"name": event.name, "input": ""}
            begun: JsonValue = {
                "index": event.index,
                "id": event.id or "",
                "type": "custom",
                "custom": custom,
            }
            yield {"tool_calls": [begun]}
        if self._custom is not None:
            self._custom.arguments.append(event.arguments)
            yield from _text_delta(self._custom, self._custom.text.push(event.arguments))
        elif self.form.is_older:
            self._first = event.index if self._first is None else self._first
            if event.index == self._first:
                yield {"function_call": _function_delta(event)}
        else:
            yield {"tool_calls": [_call_delta(event)]}

    def _finished(self, call: _CustomCall) -> Iterator[dict[str, JsonValue]]:
        self._custom = None
        whole = to_custom_input("".join(call.arguments))
        yield from _text_delta(call, whole[call.sent :])


def _text_delta(call: _CustomCall, text: str) -> Iterator[dict[str, JsonValue]]:
    call.sent += len(text)
    if text:
        yield {"tool_calls": [{"index": call.index, "custom": {"input": text}}]}


def _name(deltas: Iterable[ToolCallDelta]) -> str:
    return next((delta.name for delta in deltas if delta.name), "")


def _function(deltas: Sequence[ToolCallDelta]) -> dict[str, JsonValue]:
    return {"name": _name(deltas), "arguments": "".join(delta.arguments for delta in deltas)}


def _custom(deltas: Sequence[ToolCallDelta]) -> JsonValue:
    arguments = "".join(delta.arguments for delta in deltas)
    return {"name": _name(deltas), "input": to_custom_input(arguments)}


def _function_delta(event: ToolCallDelta) -> dict[str, JsonValue]:
    function: dict[str, JsonValue] = {"arguments": event.arguments}
    if event.name is not None:
        function["name"] = event.name
    return function


def _call_delta(event: ToolCallDelta) -> JsonValue:
    call: dict[str, JsonValue] = {"index": event.index, "function": _function_delta(event)}
    if event.id is not None:
        call |= {"id": event.id, "type": "function"}
    return call
