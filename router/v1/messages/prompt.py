"""Converts Anthropic's messages and tools into the prompt that a chat template renders."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from core.errors import RequestError, UnsupportedCapability, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, Tool, ToolCall
from router.requests.fields import check_schema
from router.requests.reasoning import decode_reasoning, with_reasoning
from router.requests.tools import ToolChoice, check_tools
from router.v1.messages import request as messages_api

# Claude Code begins its system prompt with lines that differ in every request, such as
# `x-anthropic-billing-header: …`; they would prevent the reuse of the prompt's prefix.
_HEADER_LINES = re.compile(r"\A(?:[ \t]*x-anthropic-[a-z0-9-]+:[^\n]*(?:\n|\Z))+", re.IGNORECASE)


def to_messages_prompt(request: messages_api.MessagesPromptRequest) -> ChatPrompt:
    """Return the request's prompt.

    Raises UnsupportedCapability for blocks other than text, RequestError, UnsupportedParameter.
    """
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ()))
    messages = list(_system(request.system))
    for index, message in enumerate(request.messages):
        messages += _messages(message, f"messages[{index}]")
    choice = request.tool_choice
    tool_choice = _tool_choice(choice)
    check_tools(tools, tool_choice)
    is_single = choice.disable_parallel_tool_use if choice else None
    prompt = ChatPrompt(
        messages=tuple(messages),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=None if is_single is None else not is_single,
    )
    thinking = request.thinking
    return with_reasoning(
        prompt,
        is_on=None if thinking is None or thinking.type == "adaptive" else _is_on(thinking),
        effort=request.output_config.effort if request.output_config else None,
        budget_tokens=thinking.budget_tokens if thinking else None,
    )


def _is_on(thinking: messages_api.Thinking) -> bool:
    return thinking.type == "enabled"


def _system(system: str | Sequence[messages_api.Block] | None) -> Iterator[ChatMessage]:
    """Yield the system message without the volatile lines, unless it is empty then."""
    if isinstance(system, str):
        texts = [system]
    else:
        blocks = enumerate(system or ())
        texts = [_text(block, f"system[{index}]") for index, block in blocks]
    kept = [text for text in (_HEADER_LINES.sub("", text) for text in texts) if text]
    if kept:
        yield ChatMessage("system", "\n".join(kept))


def _messages(message: messages_api.Message, param: str) -> list[ChatMessage]:
    content, role = message.content, message.role
    if isinstance(content, str):
        return [ChatMessage(role, content)]
    blocks = [(block, f"{param}.content[{index}]") for index, block in enumerate(content)]
    if role == "assistant":
        return [_assistant(blocks)]
    return list(_user(role, blocks))


def _user(
    role: Literal["user", "system"], blocks: Sequence[tuple[messages_api.Block, str]]
) -> Iterator[ChatMessage]:
    """Yield a tool message per result, and one of the role for the texts between results."""
    texts: list[str] = []
    for block, param in blocks:
        if block.type != "tool_result":
            texts.append(_text(block, param))
            continue
        if texts:
            yield ChatMessage(role, "\n".join(texts))
            texts.clear()
        yield _tool_result(block, param)
    if texts or not blocks:
        yield ChatMessage(role, "\n".join(texts))


def _tool_result(block: messages_api.Block, param: str) -> ChatMessage:
    if block.tool_use_id is None:
        raise RequestError(f"{param}.tool_use_id: required", param=f"{param}.tool_use_id")
    if isinstance(block.content, list):
        parts = enumerate(block.content)
        text = "\n".join(_text(part, f"{param}.content[{index}]") for index, part in parts)
    else:
        text = block.content or ""
    if block.is_error:
        # Chat templates have no field for failed results, so the text says it.
        text = f"Error: {text}"
    return ChatMessage("tool", text, tool_call_id=block.tool_use_id)


def _assistant(blocks: Sequence[tuple[messages_api.Block, str]]) -> ChatMessage:
    """Return one message; reasoning redacted by another server is unreadable and left out."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for block, param in blocks:
        match block.type:
            case "thinking":
                reasoning.append(block.thinking or decode_reasoning(block.signature or "") or "")
            case "redacted_thinking":
                pass
            case "tool_use":
                calls.append(_tool_use(block, param))
            case _:
                texts.append(_text(block, param))
    return ChatMessage(
        "assistant",
        "\n".join(texts),
        reasoning="\n".join(text for text in reasoning if text) or None,
        tool_calls=tuple(calls),
    )


def _tool_use(block: messages_api.Block, param: str) -> ToolCall:
    for name in ("id", "name", "input"):
        if getattr(block, name) is None:
            raise RequestError(f"{param}.{name}: required", param=f"{param}.{name}")
    try:
        arguments = json.dumps(block.input, ensure_ascii=False, allow_nan=False)
    except ValueError as problem:
        raise RequestError(
            f"{param}.input: contains a number that is infinite", param=f"{param}.input"
        ) from problem
    return ToolCall(block.id or "", block.name or "", arguments)


def _text(block: messages_api.Block, param: str) -> str:
    if block.type != "text":
        raise UnsupportedCapability(
            f"{param}: blocks of type {block.type[:50]!r} are not supported here; send text.",
            param=param,
        )
    if block.text is None:
        raise RequestError(f"{param}.text: required", param=f"{param}.text")
    return block.text


def _tool(tool: messages_api.Tool, param: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise UnsupportedParameter(
            f"{param}: tools of type {tool.type[:50]!r} are not supported; send type custom.",
            param=f"{param}.type",
        )
    if tool.input_schema is None:
        raise RequestError(f"{param}.input_schema: required", param=f"{param}.input_schema")
    check_schema(tool.input_schema, f"{param}.input_schema")
    return Tool(tool.name, tool.description or "", tool.input_schema)


def _tool_choice(choice: messages_api.ToolChoice | None) -> ToolChoice:
    match choice and choice.type:
        case "any":
            return "required"
        case "none":
            return "none"
        case "tool":
            return ("function", (choice and choice.name) or "")
        case _:
            return "auto"
