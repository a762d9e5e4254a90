"""Tools and `tool_choice`: parsing and checks shared by all APIs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from core.errors import RequestError
from core.types import Tool
from router.requests.limits import MAX_TOOLS

ChoiceMode: TypeAlias = Literal["none", "auto", "required"]
ToolChoice: TypeAlias = ChoiceMode | tuple[Literal["function"], str]


@dataclass(frozen=True, slots=True)
class AllowedTools:
    """A choice among the functions `names` alone."""

    mode: Literal["auto", "required"]
    names: frozenset[str]


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise RequestError for duplicate tool names, and for a choice without a matching tool."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            param = f"tools[{index}].name"
            raise RequestError(f"{param}: two tools have the name {tool.name[:100]!r}", param=param)
        names.add(tool.name)
    if choice == "required" and not tools:
        raise RequestError(
            "tool_choice: a forced tool call needs at least one tool in tools", param="tool_choice"
        )
    if isinstance(choice, tuple) and choice[1] not in names:
        raise RequestError(
            f"tool_choice: the tool {choice[1][:100]!r} is not in tools",
            param="tool_choice",
        )


def parse_tool_choice(value: object) -> ToolChoice | AllowedTools | None:
    """Return chat's choice; raises ValueError."""
    if value is None:
        return None
    if (mode := choice_mode(value)) is not None:
        return mode
    if (name := _tool_name(value)) is not None:
        return ("function", name)
    if (listed := allowed_tools(value)) is not None:
        names = [_tool_name(tool) for tool in listed[1]]
        return AllowedTools(listed[0], frozenset(name for name in names if name is not None))
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": …}')


def parse_function_call(value: object) -> ToolChoice | None:
    """Return the choice of `function_call`, the older form of `tool_choice`; raises ValueError."""
    match value:
        case None | "none" | "auto":
            return value
        case {"name": str(name)}:
            return ("function", name)
    raise ValueError('must be "none", "auto" or {"name": …}')


def _tool_name(value: object) -> str | None:
    """Return the name of a function or of a custom tool, which is offered as a function."""
    match value:
        case {"type": "custom", "custom": {"name": str(name)}}:
            return name
        case {"type": "custom", "name": str(name)}:
            return name
    return function_name(value)


def choice_mode(value: object) -> ChoiceMode | None:
    """Return the mode that a word or an object of any API names; None for other choices.

    Clients such as Cursor send Anthropic's shape to every API.
    """
    match value:
        case "none" | {"type": "none"}:
            return "none"
        case "auto" | {"type": "auto"}:
            return "auto"
        case "required" | "any" | {"type": "required" | "any"}:
            return "required"
    return None


def function_name(value: object) -> str | None:
    """Return the name of a function as any API refers to one; None for other tools."""
    match value:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case {"type": "function" | "tool", "name": str(name)}:
            return name
    return None


def allowed_tools(value: object) -> tuple[Literal["auto", "required"], list[object]] | None:
    """Return the mode and the references to tools of a choice of type `allowed_tools`.

    Reads the shape of chat completions and that of the Responses API; None for other choices.
    Raises ValueError for too many tools.
    """
    if not isinstance(value, dict) or value.get("type") != "allowed_tools":
        return None
    match value.get("allowed_tools", value):
        case {"mode": "auto" | "required" as mode, "tools": list(tools)}:
            if len(tools) > MAX_TOOLS:
                raise ValueError(f"has {len(tools)} tools; at most {MAX_TOOLS} are accepted")
            return mode, tools
    raise ValueError('needs mode, which is "auto" or "required", and tools, which is a list')
