"""Converts the items of a request's input into messages."""

from collections.abc import Sequence
from dataclasses import replace

from core.errors import RequestError
from core.types import ChatMessage, ToolCall
from router.requests.custom_input import to_arguments
from router.requests.reasoning import decode_reasoning
from router.requests.unreadable import last_question
from router.v1.responses import request as responses_api
from router.v1.responses.other_items import OtherItem
from router.v1.responses.parts import PartReader
from router.v1.responses.tools import offered_name


class ItemReader:
    """Reads the items of one request; the items of one assistant's turn become one message.

    `skipped` are the items that hold nothing a model could read.
    """

    def __init__(self) -> None:
        self._parts = PartReader()
        self._messages: list[ChatMessage] = []
        # By the index of their message: thousands of calls may join one turn.
        self._calls: dict[int, list[ToolCall]] = {}
        self.skipped: list[str] = []

    @property
    def ignored(self) -> list[str]:
        """The items that were skipped, and the types of parts that became notes."""
        return [*self.skipped, *sorted(self._parts.unreadable.names)]

    def messages(self, items: Sequence[tuple[str, responses_api.Item]]) -> list[ChatMessage]:
        """Return the messages of items, each given with its place in the request.

        Raises UnsupportedCapability for parts other than text in the user's last message, and
        RequestError.
        """
        asked = last_question(item.role or "" for _, item in items)
        for index, (param, item) in enumerate(items):
            self._add(item, param, is_asked=index == asked)
        for index, calls in self._calls.items():
            self._messages[index] = replace(self._messages[index], tool_calls=tuple(calls))
        return self._messages

    def _add(self, item: responses_api.Item, param: str, *, is_asked: bool) -> None:
        match item.type or "message":
            case "message":
                self._add_message(item, param, is_asked=is_asked)
            case "function_call":
                self._add_call(item, item.arguments or "{}", param)
            case "custom_tool_call":
                text = _required(item.input, f"{param}.input")
                self._add_call(item, to_arguments(text), param)
            case "function_call_output" | "custom_tool_call_output":
                if item.output is None:
                    raise RequestError(f"{param}.output: required", param=f"{param}.output")
                output = self._parts.joined(item.output, f"{param}.output")
                self._messages.append(ChatMessage("tool", output, tool_call_id=item.call_id))
            case "reasoning":
                self._add_reasoning(item, param)
            case _:
                self._add_other(item, param)

    def _add_message(self, item: responses_api.Item, param: str, *, is_asked: bool) -> None:
        role = _required(item.role, f"{param}.role")
        content = item.content
        if content is None and role == "assistant":
            content = ""
        text = self._parts.joined(content, f"{param}.content", is_asked=is_asked)
        last = self._messages[-1] if self._messages else None
        match role:
            case "assistant" if last is not None and self._is_reasoning_alone(last):
                self._messages[-1] = replace(last, content=text)
            case "assistant" | "user" | "system":
                self._messages.append(ChatMessage(role, text))
            case _:
                self._messages.append(ChatMessage("system", text))

    def _is_reasoning_alone(self, last: ChatMessage) -> bool:
        has_calls = len(self._messages) - 1 in self._calls
        return last.role == "assistant" and not (last.content or has_calls)

    def _add_call(self, item: responses_api.Item, arguments: str, param: str) -> None:
        call_id = _required(item.call_id, f"{param}.call_id")
        name = offered_name(_required(item.name, f"{param}.name"), item.namespace)
        self._add_calls((ToolCall(call_id, name, arguments),))

    def _add_calls(self, calls: tuple[ToolCall, ...]) -> None:
        if not self._messages or self._messages[-1].role != "assistant":
            self._messages.append(ChatMessage("assistant", ""))
        self._calls.setdefault(len(self._messages) - 1, []).extend(calls)

    def _add_reasoning(self, item: responses_api.Item, param: str) -> None:
        """Add a message with reasoning only; the assistant's next item is merged into it."""
        joined = self._parts.joined
        text = joined(item.content, f"{param}.content") if item.content else ""
        if not text and item.encrypted_content:
            # Reasoning encrypted by another server is unreadable and left out.
            text = decode_reasoning(item.encrypted_content) or ""
        if not text and item.summary:
            text = joined(item.summary, f"{param}.summary")
        if text:
            self._messages.append(ChatMessage("assistant", "", reasoning=text))

    def _add_other(self, item: responses_api.Item, param: str) -> None:
        call_id = f"call_{len(self._messages)}"
        messages = OtherItem(item.other_item or {}, param, self._parts.unreadable).messages(call_id)
        if not messages:
            self.skipped.append(param)
        for message in messages:
            if message.tool_calls:
                self._add_calls(message.tool_calls)
            else:
                self._messages.append(message)


def _required(value: str | None, param: str) -> str:
    if value is None:
        raise RequestError(f"{param}: required", param=param)
    return value
