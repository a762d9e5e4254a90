"""Tools and `tool_choice`: parsing and checks shared by all APIs."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from core.errors import RequestError, UnsupportedParameter
from core.types import Tool

ToolChoice: TypeAlias = Literal["none", "auto", "required"] | tuple[Literal["function"], str]


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


def parse_tool_choice(value: object) -> ToolChoice | None:
    """Return the choice; raises ValueError, or UnsupportedParameter for other tools' choices."""
    match value:
        case None:
            return None
        case "none" | "auto" | "required":
            return value
        # Cursor and other clients send Anthropic's shape to every API.
        case {"type": "none"}:
            return "none"
        case {"type": "auto"}:
            return "auto"
        case {"type": "required"}:
            return "required"
        case {"type": "any"}:
            return "required"
        case {"type": "function", "function": {"name": str(name)}}:
            return ("function", name)
        case {"type": "function" | "tool", "name": str(name)}:
            return ("function", name)
        case {"type": "allowed_tools" | "custom" as kind}:
            raise UnsupportedParameter(
                f"tool_choice of type {kind!r} is not supported; send type function.",
                param="tool_choice",
            )
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": …}')
