"""Builds the Responses API's response object: items, status and usage."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from openai.types.responses import Response as ResponseObject

from core.errors import ImpetusError, QueueFull
from core.types import ChatMessage, Finished, JsonValue, Usage
from router.answers.generation import Generation
from router.answers.logprobs import chat_logprobs
from router.answers.parts import Part, PartAssembler
from router.http.errors import shown_message
from router.requests.custom_input import to_custom_input
from router.requests.output_format import FlatFormat
from router.requests.reasoning import encode_reasoning
from router.v1.responses.prompt import answer_message
from router.v1.responses.request import OFFERED_TYPES, ResponsesRequest, Tool
from router.v1.responses.store import ResponseStore, StoredItem
from router.v1.responses.tools import OfferedTools

Status = Literal["in_progress", "completed", "incomplete", "failed"]
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
_CUSTOM_PREFIX = "ctc"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What precedes an answer, without instructions: as messages, and as items to be stored."""

    messages: Sequence[ChatMessage]
    items: Sequence[StoredItem]


@dataclass(slots=True)
class ResponseBuilder:
    """Builds one response in each status."""

    body: ResponsesRequest
    suffix: str
    generation: Generation
    conversation: Conversation
    store: ResponseStore
    offered: OfferedTools
    _base: dict[str, JsonValue] = field(init=False)

    def __post_init__(self) -> None:
        self._base = self._fixed()

    @property
    def response_id(self) -> str:
        """The answer's id."""
        return f"resp_{self.suffix}"

    def item_id(self, part: Part) -> str:
        """Return the id of a part's item."""
        prefix = _CUSTOM_PREFIX if self.is_custom(part) else _PREFIXES[part.kind]
        return f"{prefix}_{self.suffix}_{part.index}"

    def is_custom(self, part: Part) -> bool:
        """Whether a part is the call of a custom tool, whose input is text."""
        return part.kind == "call" and self.offered.origin(part.name).kind == "custom"

    def item(self, part: Part, status: Status) -> dict[str, JsonValue]:
        """Return a part as an output item; one in progress is still empty."""
        item: dict[str, JsonValue] = {"id": self.item_id(part), "status": status}
        is_empty = status == "in_progress"
        match part.kind:
            case "text":
                content: list[JsonValue] = [] if is_empty else [self.content(part)]
                return {"type": "message", **item, "role": "assistant", "content": content}
            case "reasoning":
                content = [] if is_empty else [self.content(part)]
                item = {"type": "reasoning", **item, "summary": [], "content": content}
                if self.body.includes_encrypted_reasoning:
                    item["encrypted_content"] = "" if is_empty else encode_reasoning(part.text)
                return item
            case "call":
                return {**item, **self._call(part, is_empty=is_empty)}

    def _call(self, part: Part, *, is_empty: bool) -> dict[str, JsonValue]:
        origin = self.offered.origin(part.name)
        call: dict[str, JsonValue] = {"call_id": part.call_id, "name": origin.name}
        if origin.namespace is not None:
            call["namespace"] = origin.namespace
        if origin.kind == "custom":
            text = "" if is_empty else to_custom_input(part.text)
            return {"type": "custom_tool_call", **call, "input": text}
        arguments = "" if is_empty else part.text
        return {"type": "function_call", **call, "arguments": arguments}

    def content(self, part: Part, *, is_empty: bool = False) -> dict[str, JsonValue]:
        """Return the content of a text or of reasoning."""
        text = "" if is_empty else part.text
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs: JsonValue = []
        if self.body.logprob_count is not None and not is_empty:
            logprobs = chat_logprobs(part.logprobs)["content"]
        # OpenAI's description requires the list, also without logprobs.
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def in_progress(self) -> dict[str, JsonValue]:
        """Return the response before its first item."""
        return {**self._base, "status": "in_progress", "output": [], "usage": None}

    def failed(self, parts: Sequence[Part], error: ImpetusError) -> dict[str, JsonValue]:
        """Return the failed response with its parts so far."""
        code = "server_error"
        if error.may_retry and isinstance(error, QueueFull):
            code = "rate_limit_exceeded"
        elif error.status < 500 or not error.may_retry:
            # Codex sends a request that failed with any other code again, five times.
            code = "invalid_prompt"
        return {
            **self._base,
            "status": "failed",
            "error": {"code": code, "message": shown_message(error)},
            "output": [self.item(part, "incomplete") for part in parts],
            "usage": None,
        }

    def finished(self, assembler: PartAssembler) -> dict[str, JsonValue]:
        """Return the whole response, and store it unless the request forbids that."""
        finished, parts = assembler.finished, assembler.parts
        assert finished is not None
        last = parts[-1]
        status = final_status(finished)
        response: dict[str, JsonValue] = {
            **self._base,
            "status": status,
            "output": [self.item(part, status if part is last else "completed") for part in parts],
            "usage": _usage(finished.usage),
        }
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self.body.store is not False:
            self._store(response, assembler.parts)
        return response

    def _store(self, response: dict[str, JsonValue], parts: Sequence[Part]) -> None:
        outputs = [
            StoredItem(self.item_id(part), json.dumps(self.item(part, "completed")).encode())
            for part in parts
        ]
        self.store.put(
            self.response_id,
            to_json(response),
            [*self.conversation.messages, answer_message(parts)],
            self.conversation.items,
            outputs,
        )

    def _fixed(self) -> dict[str, JsonValue]:
        """Return the fields that do not depend on the status: mostly the request's own."""
        body = self.body
        text_format = body.text.format if body.text else None
        effort = body.reasoning.effort if body.reasoning else None
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.generation.created_at,
            "model": self.generation.view.id,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": dict(body.metadata),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": effort, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": _format(text_format) if text_format else {"type": "text"}},
            "tool_choice": body.tool_choice.sent if body.tool_choice else "auto",
            "tools": [_tool(tool) for tool in body.tools or () if tool.type in OFFERED_TYPES],
            "top_p": body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }


def final_status(finished: Finished | None) -> Status:
    """Return the final status of an answer, or of an item that ends before the answer."""
    is_cut = finished is not None and finished.reason == "length"
    return "incomplete" if is_cut else "completed"


def to_json(response: dict[str, JsonValue]) -> bytes:
    """Return a response as JSON, validated by OpenAI's own type."""
    return (
        ResponseObject.model_validate(response)
        .model_dump_json(exclude_unset=True, by_alias=True)
        .encode()
    )


def _tool(tool: Tool) -> dict[str, JsonValue]:
    own: dict[str, JsonValue] = {"type": tool.type, "name": tool.name}
    if tool.description is not None:
        own["description"] = tool.description
    match tool.type:
        case "namespace":
            inner: list[JsonValue] = [
                _tool(one) for one in tool.tools or () if one.type in ("function", "custom")
            ]
            return {"description": "", **own, "tools": inner}
        case "custom":
            form = tool.format
            shown: dict[str, JsonValue] = {"type": "text"}
            if form is not None and form.type == "grammar":
                shown = {"type": "grammar", "syntax": form.syntax, "definition": form.definition}
            return {**own, "format": shown}
    return {**own, "parameters": tool.parameters, "strict": tool.strict}


def _format(text_format: FlatFormat) -> JsonValue:
    """Return the format as OpenAI's type allows it, which knows no unknown fields."""
    if text_format.type != "json_schema":
        return {"type": text_format.type}
    nested = text_format.json_schema
    named = text_format if nested is None else nested
    schema = text_format.own_schema if nested is None else nested.body
    echoed: dict[str, JsonValue] = {
        "type": "json_schema",
        # OpenAI requires a name; requests here need none.
        "name": named.name or "schema",
        "description": named.description,
        "strict": named.strict,
        "schema": text_format.own_schema if schema is None else schema,
    }
    return {name: value for name, value in echoed.items() if value is not None}


def _usage(counts: Usage) -> JsonValue:
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }
