"""Converts Responses items and tools into messages and the prompt of a chat template."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from core.errors import RequestError, UnsupportedCapability
from core.types import ChatMessage, ChatPrompt, ToolCall
from router.answers import parts as answer
from router.requests.limits import MAX_MESSAGES
from router.requests.reasoning import decode_reasoning, with_reasoning
from router.v1.arguments import check_arguments
from router.v1.responses import request as responses_api
from router.v1.responses.custom_input import to_arguments
from router.v1.responses.tools import OfferedTools, offered_name

_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


def to_responses_prompt(
    request: responses_api.ResponsesRequest,
    conversation: Sequence[ChatMessage],
    offered: OfferedTools,
) -> ChatPrompt:
    """Return the prompt of `conversation`, which includes the request's input.

    Raises RequestError.
    """
    if len(conversation) > MAX_MESSAGES:
        raise RequestError(
            f"input: the conversation has {len(conversation)} messages with previous responses; "
            f"at most {MAX_MESSAGES} are accepted",
            param="input",
        )
    system = [ChatMessage("system", request.instructions)] if request.instructions else []
    prompt = ChatPrompt(
        messages=(*system, *conversation),
        tools=offered.tools,
        tool_choice=offered.choice,
        parallel_tool_calls=request.parallel_tool_calls,
    )
    effort = request.reasoning.effort if request.reasoning else None
    return with_reasoning(prompt, effort=effort)


def input_messages(request: responses_api.ResponsesRequest) -> list[ChatMessage]:
    """Return the request's own input; the items of one assistant's turn become one message.

    Raises UnsupportedCapability for items and parts other than text, RequestError.
    """
    if isinstance(request.input, str):
        return [ChatMessage("user", request.input)]
    messages: list[ChatMessage] = []
    for index, item in enumerate(request.input):
        param = f"input[{index}]"
        match item.type or "message":
            case "message":
                _add_message(messages, item, param)
            case "function_call":
                arguments = _required(item.arguments, f"{param}.arguments")
                checked = check_arguments(arguments, f"{param}.arguments")
                _add_call(messages, item, checked, param)
            case "custom_tool_call":
                text = _required(item.input, f"{param}.input")
                _add_call(messages, item, to_arguments(text), param)
            case "function_call_output" | "custom_tool_call_output":
                output = _joined(item.output, f"{param}.output")
                call_id = _required(item.call_id, f"{param}.call_id")
                messages.append(ChatMessage("tool", output, tool_call_id=call_id))
            case "reasoning":
                _add_reasoning(messages, item, param)
            case kind:
                raise UnsupportedCapability(
                    f"{param}: items of type {kind[:50]!r} are not supported.", param=param
                )
    return messages


def answer_message(parts: Iterable[answer.Part]) -> ChatMessage:
    """Return an answer as the message of the next turn's prompt."""
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    calls = []
    for part in parts:
        if part.kind == "call":
            calls.append(ToolCall(part.call_id, part.name, part.text))
        else:
            texts[part.kind].append(part.text)
    return ChatMessage(
        "assistant",
        "".join(texts["text"]),
        reasoning="".join(texts["reasoning"]) or None,
        tool_calls=tuple(calls),
    )


def _add_message(messages: list[ChatMessage], item: responses_api.Item, param: str) -> None:
    role = _required(item.role, f"{param}.role")
    content = _joined(item.content, f"{param}.content")
    last = messages[-1] if messages else None
    match role:
        case "assistant" if last is not None and _is_reasoning_alone(last):
            messages[-1] = replace(last, content=content)
        case "assistant" | "user" | "system":
            messages.append(ChatMessage(role, content))
        case _:
            messages.append(ChatMessage("system", content))


def _add_call(
    messages: list[ChatMessage], item: responses_api.Item, arguments: str, param: str
) -> None:
    call_id = _required(item.call_id, f"{param}.call_id")
    name = offered_name(_required(item.name, f"{param}.name"), item.namespace)
    call = ToolCall(call_id, name, arguments)
    if messages and messages[-1].role == "assistant":
        last = messages[-1]
        messages[-1] = replace(last, tool_calls=(*last.tool_calls, call))
    else:
        messages.append(ChatMessage("assistant", "", tool_calls=(call,)))


def _add_reasoning(messages: list[ChatMessage], item: responses_api.Item, param: str) -> None:
    """Add a message with reasoning only; the assistant's next item is merged into it."""
    text = _joined(item.content, f"{param}.content") if item.content else ""
    if not text and item.encrypted_content:
        # Reasoning encrypted by another server is unreadable and left out.
        text = decode_reasoning(item.encrypted_content) or ""
    if not text and item.summary:
        text = _joined(item.summary, f"{param}.summary")
    if text:
        messages.append(ChatMessage("assistant", "", reasoning=text))


def _is_reasoning_alone(message: ChatMessage) -> bool:
    return message.role == "assistant" and not (message.content or message.tool_calls)


def _joined(content: str | Sequence[responses_api.Part] | None, param: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise RequestError(f"{param}: required", param=param)
    return "\n".join(_text(part, f"{param}[{index}]") for index, part in enumerate(content))


def _text(part: responses_api.Part, param: str) -> str:
    if part.type not in _TEXTS and part.type != "refusal":
        raise UnsupportedCapability(
            f"{param}: parts of type {part.type[:50]!r} are not supported; send text.", param=param
        )
    text = part.refusal if part.type == "refusal" else part.text
    return _required(text, f"{param}.{'refusal' if part.type == 'refusal' else 'text'}")


def _required(value: str | None, param: str) -> str:
    if value is None:
        raise RequestError(f"{param}: required", param=param)
    return value
