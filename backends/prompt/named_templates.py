"""Named chat templates: which a model may have beside its default one, and what they say of it."""

import re
from collections.abc import Iterable

from core.types import Capability

# Source: transformers' `get_chat_template` and llama.cpp; other names need what no request carries.
TOOL_USE = "tool_use"
_TOOLS = re.compile(r"\btools\b")


def template_capabilities(templates: Iterable[str | None]) -> set[Capability]:
    """Return the capabilities, of tools and reasoning, that a model's templates show."""
    capabilities = set()
    for template in templates:
        if reads_tools(template or ""):
            capabilities.add(Capability.TOOLS)
        if "<think>" in (template or ""):
            capabilities.add(Capability.REASONING)
    return capabilities


def reads_tools(template: str) -> bool:
    """Return whether a template names the variable `tools`, other than in a comment."""
    start = 0
    while (opened := template.find("{#", start)) >= 0:
        if _TOOLS.search(template, start, opened):
            return True
        closed = template.find("#}", opened + 2)
        if closed < 0:
            return False
        start = closed + 2
    return _TOOLS.search(template, start) is not None
