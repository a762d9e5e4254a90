"""Converts Anthropic's messages and tools into the prompt that a chat template renders."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from core.errors import RequestError, UnsupportedParameter
from core.text import is_nested_deeper
from core.types import ChatMessage, ChatPrompt, JsonValue, Tool, ToolCall
from router.requests.fields import check_schema
from router.requests.reasoning import decode_reasoning, with_reasoning
from router.requests.tools import ToolChoice, check_tools
from router.requests.unreadable import last_question
from router.v1.messages import request as messages_api
from router.v1.messages.blocks import BlockReader
from router.v1.messages.threads import EMPTY, KeptThread

# Claude Code begins its system prompt with lines that differ in every request, such as
# `x-anthropic-billing-header: …`; they would prevent the reuse of the prompt's prefix.
_HEADER_LINES = re.compile(r"\A(?:[ \t]*x-anthropic-[a-z0-9-]+:[^\n]*(?:\n|\Z))+", re.IGNORECASE)


def to_messages_prompt(
    request: messages_api.MessagesPromptRequest,
    reader: BlockReader | None = None,
    earlier: KeptThread = EMPTY,
) -> ChatPrompt:
    """Return the request's prompt; `reader` then knows which blocks became notes.

    `earlier` is the kept conversation that the messages follow, with its system prompt and tools.
    Raises UnsupportedCapability for unreadable blocks that the user sends now, and RequestError.
    """
    return thread_prompt(request, read_thread(request, reader or BlockReader(), earlier))


def read_thread(
    request: messages_api.MessagesPromptRequest, reader: BlockReader, earlier: KeptThread
) -> KeptThread:
    """Return the whole conversation so far.  Raises as `to_messages_prompt` does."""
    system = earlier.system
    if request.system is not None:
        system = tuple(_system(request.system, reader))
    tools = earlier.tools
    if request.tools is not None:
        tools = tuple(_tools(request.tools))
    messages = list(earlier.messages)
    asked = last_question(message.role for message in request.messages)
    for index, message in enumerate(request.messages):
        if not message.content and message.role == "system":
            continue
        if message.clear_at == "next_user_message" and index < asked:
            continue
        messages += _messages(message, f"messages[{index}]", reader, is_asked=index == asked)
    return KeptThread(system, tools, tuple(messages))


def thread_prompt(request: messages_api.MessagesPromptRequest, thread: KeptThread) -> ChatPrompt:
    """Return the prompt of a conversation.  Raises RequestError, UnsupportedParameter."""
    tools = thread.tools
    choice = request.tool_choice
    tool_choice = _tool_choice(choice)
    _refuse_forced(request.tools or (), tools, tool_choice)
    check_tools(tools, tool_choice)
    messages = _without_blank_answer(thread.messages)
    last = messages[-1] if messages else None
    is_single = choice.disable_parallel_tool_use if choice else None
    prompt = ChatPrompt(
        messages=(*thread.system, *messages),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=None if is_single is None else not is_single,
        # Calls without results are not begun text; the model answers after them.
        continues_answer=last is not None and last.role == "assistant" and not last.tool_calls,
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


def _system(
    system: str | Sequence[messages_api.Block] | None, reader: BlockReader
) -> Iterator[ChatMessage]:
    """Yield the system message without the volatile lines, unless it is empty then."""
    if isinstance(system, str):
        texts = [system]
    else:
        blocks = enumerate(system or ())
        texts = [reader.text(block, f"system[{index}]", is_asked=False) for index, block in blocks]
    kept = [text for text in (_HEADER_LINES.sub("", text) for text in texts) if text]
    if kept:
        yield ChatMessage("system", "\n".join(kept))


def _messages(
    message: messages_api.Message, param: str, reader: BlockReader, *, is_asked: bool
) -> list[ChatMessage]:
    content, role = message.content, message.role
    if isinstance(content, str):
        return [ChatMessage(role, content)]
    blocks = [(block, f"{param}.content[{index}]") for index, block in enumerate(content)]
    if role == "assistant":
        return [_assistant(blocks, reader)]
    return list(_user(role, blocks, reader, is_asked=is_asked))


def with_answer(thread: KeptThread, blocks: Iterable[JsonValue]) -> KeptThread:
    """Return the conversation with an answer's blocks, as if the client had sent them back.

    An answer without blocks adds no message.
    """
    parsed = [(messages_api.Block.model_validate(block), "content") for block in blocks]
    if not parsed:
        return thread
    answer = _assistant(parsed, BlockReader())
    earlier = _without_blank_answer(thread.messages)
    if earlier and earlier[-1].role == "assistant" and not earlier[-1].tool_calls:
        # The answer continued what the request began.
        begun, earlier = earlier[-1], earlier[:-1]
        reasoning = "".join(part for part in (begun.reasoning, answer.reasoning) if part)
        answer = replace(
            answer, content=begun.content + answer.content, reasoning=reasoning or None
        )
    return replace(thread, messages=(*earlier, answer))


def _without_blank_answer(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """Return the messages without a last answer that begins nothing."""
    last = messages[-1] if len(messages) > 1 else None
    if last is None or last.role != "assistant":
        return messages
    is_blank = not (last.content.strip() or last.reasoning or last.tool_calls)
    return messages[:-1] if is_blank else messages


def _user(
    role: Literal["user", "system"],
    blocks: Sequence[tuple[messages_api.Block, str]],
    reader: BlockReader,
    *,
    is_asked: bool,
) -> Iterator[ChatMessage]:
    """Yield a tool message per result, and one of the role for the texts between results."""
    texts: list[str] = []
    for block, param in blocks:
        if block.type != "tool_result":
            texts.append(reader.text(block, param, is_asked=is_asked))
            continue
        if texts:
            yield ChatMessage(role, "\n".join(texts))
            texts.clear()
        yield _tool_result(block, param, reader)
    if texts or not blocks:
        yield ChatMessage(role, "\n".join(texts))


def _tool_result(block: messages_api.Block, param: str, reader: BlockReader) -> ChatMessage:
    if block.tool_use_id is None:
        raise RequestError(f"{param}.tool_use_id: required", param=f"{param}.tool_use_id")
    if isinstance(block.content, str):
        text = block.content
    else:
        parts = [block.content] if isinstance(block.content, messages_api.Block) else block.content
        text = "\n".join(
            reader.text(part, f"{param}.content[{index}]", is_asked=False)
            for index, part in enumerate(parts or ())
        )
    if block.is_error:
        # Chat templates have no field for failed results, so the text says it.
        text = f"Error: {text}"
    return ChatMessage("tool", text, tool_call_id=block.tool_use_id)


def _assistant(
    blocks: Sequence[tuple[messages_api.Block, str]], reader: BlockReader
) -> ChatMessage:
    """Return one message; reasoning redacted by another server is unreadable and left out."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for block, param in blocks:
        match block.type:
            case "thinking":
                reasoning.append(block.thinking or decode_reasoning(block.signature or "") or "")
            case "tool_use":
                calls.append(_tool_use(block, param))
            case kind:
                text = reader.text(block, param, is_asked=False)
                if text or kind == "text":
                    texts.append(text)
    return ChatMessage(
        "assistant",
        "\n".join(texts),
        reasoning="\n".join(text for text in reasoning if text) or None,
        tool_calls=tuple(calls),
    )


def _tool_use(block: messages_api.Block, param: str) -> ToolCall:
    for name in ("id", "name"):
        if getattr(block, name) is None:
            raise RequestError(f"{param}.{name}: required", param=f"{param}.{name}")
    return ToolCall(block.id or "", block.name or "", _arguments(block.input))


def _arguments(value: object) -> str:
    """Return the JSON object of an earlier call's arguments, whatever a model wrote in its place.

    Text that is not a JSON object becomes the single argument `arguments`, as in our own answers.
    """
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
            if is_nested_deeper(value):
                decoded = None
        except (ValueError, RecursionError):
            decoded = None
        value = decoded if isinstance(decoded, dict) else {"arguments": value} if value else {}
    elif value is None:
        value = {}
    elif not isinstance(value, dict):
        value = {"arguments": value}
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        # A number such as 1e999 is read as infinite, which JSON cannot hold.
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(finite, ensure_ascii=False)


def _tools(tools: Sequence[messages_api.Tool]) -> Iterator[Tool]:
    """Yield the client's own tools; those that Anthropic runs or trained for are left out."""
    for index, tool in enumerate(tools):
        if not tool.is_of_anthropic:
            yield _tool(tool, f"tools[{index}]")


def _refuse_forced(
    all_tools: Sequence[messages_api.Tool], tools: Sequence[Tool], choice: ToolChoice
) -> None:
    """Raise UnsupportedParameter for a forced call of a tool that was left out."""
    left_out = [tool for tool in all_tools if tool.is_of_anthropic]
    if isinstance(choice, tuple):
        left_out = [tool for tool in left_out if tool.name == choice[1]]
    if left_out and (isinstance(choice, tuple) or (choice == "required" and not tools)):
        raise UnsupportedParameter(
            f"tool_choice: tools of type {(left_out[0].type or '')[:50]!r} exist on Anthropic's "
            "servers only, so a call cannot be forced here; send a tool with input_schema.",
            param="tool_choice",
        )


def _tool(tool: messages_api.Tool, param: str) -> Tool:
    if tool.input_schema is None:
        raise RequestError(f"{param}.input_schema: required", param=f"{param}.input_schema")
    if not tool.name:
        raise RequestError(f"{param}.name: required", param=f"{param}.name")
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
