"""Converts OpenAI's messages and tools into the prompt that a chat template renders."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from core.errors import RequestError
from core.types import ChatMessage, ChatPrompt, Tool, ToolCall
from router.requests.custom_input import custom_parameters, to_arguments
from router.requests.fields import check_schema
from router.requests.reasoning import merge_budget, merge_effort
from router.requests.tools import AllowedTools
from router.requests.unreadable import (
    UnreadableParts,
    document_text,
    last_question,
    text_of_data_url,
    text_or_empty,
)
from router.services import ModelView
from router.v1.chat.request import (
    ChatRequest,
    ContentPart,
    CustomTool,
    Function,
    FunctionCall,
    Message,
)

_ROLES: Mapping[str, Literal["system", "user", "assistant", "tool"]] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXTS = frozenset({"text", "input_text", "output_text", "refusal"})


def to_chat_prompt(request: ChatRequest, unreadable: UnreadableParts | None = None) -> ChatPrompt:
    """Return the request's prompt; `unreadable` then knows which parts became notes.

    Raises UnsupportedCapability for parts other than text in the user's last message, and
    RequestError.
    """
    unreadable = unreadable or UnreadableParts()
    asked = last_question(message.role for message in request.messages)
    tools = _unique(_tools(request, unreadable.names))
    choice = request.tool_choice or request.function_call or "auto"
    if isinstance(choice, AllowedTools):
        tools = tuple(tool for tool in tools if tool.name in choice.names)
        choice = choice.mode
    if choice == "required" and not tools:
        raise RequestError(
            'tool_choice: "required" needs at least one tool that may be called in tools',
            param="tool_choice",
        )
    if isinstance(choice, tuple) and choice[1] not in {tool.name for tool in tools}:
        raise RequestError(
            f"tool_choice: the function {choice[1][:100]!r} is not in tools",
            param="tool_choice",
        )
    return ChatPrompt(
        messages=tuple(
            _message(message, f"messages[{index}]", unreadable, is_asked=index == asked)
            for index, message in enumerate(request.messages)
        ),
        tools=tools,
        tool_choice=choice,
        # The older form has room for one call.
        parallel_tool_calls=False if request.functions else request.parallel_tool_calls,
        continues_answer=bool(request.continue_final_message),
        documents=tuple(
            {"text": each} if isinstance(each, str) else each for each in request.documents or ()
        ),
        template_kwargs=dict(request.chat_template_kwargs),
        reasoning_effort=merge_effort(request.reasoning_effort, request.reasoning),
        reasoning_tokens=merge_budget(request.thinking_budget, request.reasoning),
    )


def with_continuation(
    prompt: ChatPrompt, request: ChatRequest, view: ModelView, *, by_default: bool
) -> ChatPrompt:
    """Return the prompt so that it continues an assistant's last message where that is set.

    `by_default` is the server's setting, the model's own takes precedence, and what the request
    says of it before both.  Calls are not begun text: the model answers after them.
    """
    is_said = (request.continue_final_message, request.add_generation_prompt) != (None, None)
    is_set = by_default if view.continue_answers is None else view.continue_answers
    last = prompt.messages[-1]
    if is_said or not is_set or last.role != "assistant" or last.tool_calls:
        return prompt
    return replace(prompt, continues_answer=True)


def _message(
    message: Message, param: str, unreadable: UnreadableParts, *, is_asked: bool
) -> ChatMessage:
    if message.content is None and is_asked:
        raise RequestError(f"{param}.content: required", param=f"{param}.content")
    if message.tool_calls and message.role != "assistant":
        raise RequestError(
            f"{param}.tool_calls: only allowed with the role assistant", param=f"{param}.tool_calls"
        )
    text = _text(message, f"{param}.content", unreadable, is_asked=is_asked)
    if message.audio is not None:
        note = unreadable.note("audio", f"{param}.audio", is_asked=is_asked)
        text = text or note
    return ChatMessage(
        role=_ROLES[message.role],
        content=text,
        name=message.name,
        reasoning=message.reasoning_content or message.reasoning,
        tool_calls=tuple(_calls(message, param)),
        tool_call_id=message.tool_call_id,
    )


def _calls(message: Message, param: str) -> Iterator[ToolCall]:
    """Yield the earlier calls, also those in the older form of the API and of custom tools."""
    if message.function_call is not None:
        yield _call("", message.function_call)
    for index, call in enumerate(message.tool_calls or ()):
        if call.function is not None:
            yield _call(call.id or "", call.function)
        elif call.custom is not None:
            yield ToolCall(call.id or "", call.custom.name, to_arguments(call.custom.input))
        else:
            name = f"{param}.tool_calls[{index}].function"
            raise RequestError(f"{name}: required", param=name)


def _call(call_id: str, function: FunctionCall) -> ToolCall:
    arguments = function.arguments
    if not isinstance(arguments, str):
        arguments = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call_id, function.name, arguments)


def _text(message: Message, param: str, unreadable: UnreadableParts, *, is_asked: bool) -> str:
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(
        _part_text(part, f"{param}[{index}]", unreadable, is_asked=is_asked)
        for index, part in enumerate(message.content)
    )


def _part_text(
    part: ContentPart, param: str, unreadable: UnreadableParts, *, is_asked: bool
) -> str:
    if part.type in _TEXTS:
        text = part.refusal if part.type == "refusal" else part.text
        return text_or_empty(text, f"{param}.{part.type}", is_asked=is_asked)
    file = (part.model_extra or {}).get("file")
    fields = file if isinstance(file, dict) else {}
    name = fields.get("filename")
    text = text_of_data_url(fields.get("file_data"))
    if text is not None:
        return document_text(name, text)
    return unreadable.note(part.type, param, is_asked=is_asked, title=name)


def _unique(tools: Iterable[tuple[str, Tool]]) -> tuple[Tool, ...]:
    """Return the tools, each given with its place.  Raises RequestError for a name given twice."""
    found: dict[str, Tool] = {}
    for place, tool in tools:
        if tool.name in found:
            param = f"{place}.name"
            raise RequestError(f"{param}: two tools have the name {tool.name[:100]!r}", param=param)
        found[tool.name] = tool
    return tuple(found.values())


def _tools(request: ChatRequest, ignored: set[str]) -> Iterator[tuple[str, Tool]]:
    """Yield the tools and the functions of the older form, with their places in the request.

    `ignored` then names grammars that are not enforced, and tools that cannot be offered.
    """
    for index, tool in enumerate(request.tools or ()):
        param = f"tools[{index}]"
        if tool.type == "custom":
            yield f"{param}.custom", _custom_tool(tool.custom, f"{param}.custom", ignored)
        elif tool.type == "function":
            yield f"{param}.function", _function(tool.function, f"{param}.function")
        else:
            # It runs on a server of its provider; the Responses API names such tools too.
            ignored.add(param)
    for index, function in enumerate(request.functions or ()):
        yield f"functions[{index}]", _function(function, f"functions[{index}]")


def _function(function: Function | None, param: str) -> Tool:
    if function is None:
        raise RequestError(f"{param}: required", param=param)
    parameters = function.parameters or {}
    check_schema(parameters, f"{param}.parameters")
    return Tool(function.name, function.description or "", parameters)


def _custom_tool(tool: CustomTool | None, param: str, ignored: set[str]) -> Tool:
    """Return a function with one text that stands for a custom tool."""
    if tool is None:
        raise RequestError(f"{param}: required", param=param)
    form = tool.format.flat if tool.format is not None else None
    custom = custom_parameters(form, f"{param}.format.grammar")
    if not custom.is_exact:
        ignored.add(f"{param}.format")
    description = f"{tool.description or ''}\n{custom.hint}".strip()
    return Tool(tool.name, description, custom.parameters)
