"""What holds for the tools of every API whose bodies name them flatly."""

from collections.abc import Sequence

from core.errors import RequestError
from core.types import Tool
from router.v1.requests import ToolChoice


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise RequestError for two tools of one name, and for a choice that no tool answers."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            param = f"tools[{index}].name"
            raise RequestError(f"{param}: {tool.name[:100]!r} was named before", param=param)
        names.add(tool.name)
    if choice == "required" and not tools:
        raise RequestError(
            "tool_choice: a tool that must be called needs tools", param="tool_choice"
        )
    if isinstance(choice, tuple) and choice[1] not in names:
        raise RequestError(
            f"tool_choice: the tool {choice[1][:100]!r} is not among the tools",
            param="tool_choice",
        )
