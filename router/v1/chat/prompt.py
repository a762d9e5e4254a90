"""Converts OpenAI's messages and tools into the prompt that a chat template renders."""

from collections.abc import Sequence
from typing import Literal

from core.errors import RequestError, UnsupportedCapability, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, Tool, ToolCall
from router.requests.fields import check_schema, refuse_unless_off
from router.requests.reasoning import merge_budget, merge_effort
from router.v1.chat.request import ChatRequest, ContentPart, Message, ToolDefinition


def to_chat_prompt(request: ChatRequest) -> ChatPrompt:
    """Return the request's prompt.

    Raises UnsupportedCapability for parts other than text, RequestError, UnsupportedParameter.
    """
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ()))
    _check_unique_names(tools)
    choice = request.tool_choice or "auto"
    if choice == "required" and not tools:
        raise RequestError(
            'tool_choice: "required" needs at least one tool in tools', param="tool_choice"
        )
    if isinstance(choice, tuple) and choice[1] not in {tool.name for tool in tools}:
        raise RequestError(
            f"tool_choice: the function {choice[1][:100]!r} is not in tools",
            param="tool_choice",
        )
    return ChatPrompt(
        messages=tuple(
            _message(message, f"messages[{index}]")
            for index, message in enumerate(request.messages)
        ),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        template_kwargs=dict(request.chat_template_kwargs),
        reasoning_effort=merge_effort(request.reasoning_effort, request.reasoning),
        reasoning_tokens=merge_budget(request.thinking_budget, request.reasoning),
    )


def _message(message: Message, param: str) -> ChatMessage:
    refuse_unless_off(f"{param}.function_call", message.function_call, (None,))
    refuse_unless_off(f"{param}.audio", message.audio, (None,))
    if message.content is None and message.role != "assistant":
        raise RequestError(f"{param}.content: required", param=f"{param}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError(f"{param}.tool_call_id: required", param=f"{param}.tool_call_id")
    if message.tool_calls and message.role != "assistant":
        raise RequestError(
            f"{param}.tool_calls: only allowed with the role assistant", param=f"{param}.tool_calls"
        )
    role: Literal["system", "user", "assistant", "tool"] = (
        "system" if message.role == "developer" else message.role
    )
    return ChatMessage(
        role=role,
        content=_text(message, f"{param}.content"),
        name=message.name,
        reasoning=message.reasoning_content or message.reasoning,
        tool_calls=tuple(
            ToolCall(
                call.id,
                call.function.name,
                call.function.arguments,
            )
            for call in message.tool_calls or ()
        ),
        tool_call_id=message.tool_call_id,
    )


def _text(message: Message, param: str) -> str:
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    parts = enumerate(message.content)
    return "\n".join(_part_text(part, f"{param}[{index}]") for index, part in parts)


def _part_text(part: ContentPart, param: str) -> str:
    if part.type not in ("text", "refusal"):
        raise UnsupportedCapability(
            f"Content parts of type {part.type[:50]!r} are not supported; send text.", param=param
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise RequestError(f"{param}.{part.type}: required", param=f"{param}.{part.type}")
    return text


def _check_unique_names(tools: Sequence[Tool]) -> None:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            param = f"tools[{index}].function.name"
            raise RequestError(f"{param}: two tools have the name {tool.name[:100]!r}", param=param)
        names.add(tool.name)


def _tool(tool: ToolDefinition, param: str) -> Tool:
    if tool.type != "function":
        raise UnsupportedParameter(
            f"{param}: tools of type {tool.type[:50]!r} are not supported; send type function.",
            param=f"{param}.type",
        )
    if tool.function is None:
        raise RequestError(f"{param}.function: required", param=f"{param}.function")
    parameters = tool.function.parameters or {}
    check_schema(parameters, f"{param}.function.parameters")
    return Tool(tool.function.name, tool.function.description or "", parameters)
