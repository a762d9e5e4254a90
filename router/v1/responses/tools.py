"""Turns the request's tools into functions for the model, and calls back into each tool's form.

Namespaces are flattened, custom tools become functions with one text, and tools that run on
OpenAI's servers are left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from core.errors import RequestError, UnsupportedParameter
from core.types import Tool
from router.requests.custom_input import custom_parameters
from router.requests.fields import check_schema
from router.requests.limits import MAX_TOOLS, too_many
from router.requests.tools import ToolChoice, check_tools
from router.v1.responses import request as responses_api

ToolKind: TypeAlias = Literal["function", "custom"]


@dataclass(frozen=True, slots=True)
class ToolOrigin:
    """The tool as the client knows it, behind a name that the model is offered."""

    kind: ToolKind
    name: str
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """What the model may call; `origins` has the name offered for each tool.

    `ignored` names the request's tools that cannot be offered.
    """

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "auto"
    origins: Mapping[str, ToolOrigin] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def origin(self, name: str) -> ToolOrigin:
        """Return the tool behind an offered name; unknown names are functions' own."""
        return self.origins.get(name) or ToolOrigin("function", name)


def offered_name(name: str, namespace: str | None) -> str:
    """Return the name of a namespace's tool as the model sees it.

    Codex ends the namespaces of MCP servers with the separator itself, as in `mcp__files__`.
    """
    if not namespace:
        return name
    separator = "" if namespace.endswith(("__", ".", "/")) else "__"
    return f"{namespace}{separator}{name}"


def offer_tools(request: responses_api.ResponsesRequest) -> OfferedTools:
    """Return the tools the model may call, and the choice among them.

    Raises RequestError, and UnsupportedParameter for a choice that forces a tool left out.
    """
    tools: list[Tool] = []
    origins: dict[str, ToolOrigin] = {}
    ignored: list[str] = []
    for param, tool, namespace in _flattened(request.tools or ()):
        if tool.type not in ("function", "custom"):
            ignored.append(param)
            continue
        offered, is_exact = _tool(tool, namespace, param)
        if not is_exact:
            ignored.append(f"{param}.format")
        if offered.name in origins:
            raise RequestError(
                f"{param}.name: two tools have the name {offered.name[:100]!r}",
                param=f"{param}.name",
            )
        kind: ToolKind = "custom" if tool.type == "custom" else "function"
        name = tool.name or ""
        origins[offered.name] = ToolOrigin(kind, name, namespace.name if namespace else None)
        tools.append(offered)
        if len(tools) > MAX_TOOLS:
            raise too_many("tools", len(tools), "tools with those of namespaces", MAX_TOOLS)
    choice = request.tool_choice or responses_api.ToolChoice()
    is_allowed = _allowed(choice)
    allowed = [tool for tool in tools if is_allowed(origins[tool.name])]
    resolved = _choice(choice, origins)
    if choice.mode == "required" and not allowed and request.tools:
        raise UnsupportedParameter(
            "tool_choice: none of the tools it may choose from can be offered here; send a tool of "
            "type function, custom or namespace, or auto.",
            param="tool_choice",
        )
    check_tools(tools, resolved)
    return OfferedTools(tuple(allowed), resolved, origins, tuple(ignored))


def _flattened(
    tools: Sequence[responses_api.Tool],
) -> Iterator[tuple[str, responses_api.Tool, responses_api.Tool | None]]:
    """Yield each tool with its path in the request and its namespace."""
    for index, tool in enumerate(tools):
        param = f"tools[{index}]"
        if tool.type != "namespace":
            yield param, tool, None
            continue
        if tool.name is None:
            raise RequestError(f"{param}.name: required", param=f"{param}.name")
        for inner_index, inner in enumerate(tool.tools or ()):
            yield f"{param}.tools[{inner_index}]", inner, tool


def _tool(
    tool: responses_api.Tool, namespace: responses_api.Tool | None, param: str
) -> tuple[Tool, bool]:
    """Return the tool as a function, and whether its format is enforced."""
    if tool.name is None:
        raise RequestError(f"{param}.name: required", param=f"{param}.name")
    description = tool.description or ""
    if namespace is not None and namespace.description:
        description = f"{namespace.description}\n{description}".strip()
    name = offered_name(tool.name, namespace.name if namespace else None)
    if tool.type == "custom":
        custom = custom_parameters(tool.format, f"{param}.format")
        if custom.hint:
            description = f"{description}\n{custom.hint}".strip()
        return Tool(name, description, custom.parameters), custom.is_exact
    parameters = tool.parameters or {}
    check_schema(parameters, f"{param}.parameters")
    return Tool(name, description, parameters), True


def _allowed(choice: responses_api.ToolChoice) -> Callable[[ToolOrigin], bool]:
    """Return what tells whether a tool may be called; it costs the same however many are named."""
    if choice.allowed is None:
        return lambda _: True
    named = {(one.type, one.namespace, one.name) for one in choice.allowed}

    def is_allowed(origin: ToolOrigin) -> bool:
        if origin.namespace is not None and ("namespace", None, origin.namespace) in named:
            return True
        whole = offered_name(origin.name, origin.namespace)
        return not named.isdisjoint(
            {
                (origin.kind, origin.namespace, origin.name),
                (origin.kind, None, origin.name),
                (origin.kind, None, whole),
            }
        )

    return is_allowed


def _matches(named: responses_api.NamedTool, origin: ToolOrigin) -> bool:
    if named.type != origin.kind:
        return False
    whole = offered_name(origin.name, origin.namespace)
    if named.namespace is not None:
        return (named.namespace, named.name) == (origin.namespace, origin.name)
    return named.name in (origin.name, whole)


def _choice(choice: responses_api.ToolChoice, origins: Mapping[str, ToolOrigin]) -> ToolChoice:
    if choice.named is None:
        return choice.mode
    named = choice.named
    if named.type not in ("function", "custom"):
        raise UnsupportedParameter(
            f"tool_choice of type {named.type[:50]!r} is not supported: such tools cannot run "
            "here; send type function or custom.",
            param="tool_choice",
        )
    matching = [name for name, origin in origins.items() if _matches(named, origin)]
    exact = named.name if named.name in matching else None
    if len(matching) > 1 and exact is None:
        raise RequestError(
            f"tool_choice: several tools have the name {named.name[:100]!r}; add namespace",
            param="tool_choice",
        )
    if not matching:
        raise RequestError(
            f"tool_choice: no tool of type {named.type} in tools has the name {named.name[:100]!r}",
            param="tool_choice",
        )
    return ("function", exact or matching[0])
