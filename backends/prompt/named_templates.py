"""Named chat templates: which a model may have beside its default one, and what they say of it."""

import re
from collections.abc import Iterable

from core.types import Capability

# Source: transformers' `get_chat_template` and llama.cpp; other names need what no request carries.
TOOL_USE = "tool_use"
TOOLS = re.compile(r"\btools\b")


def template_capabilities(templates: Iterable[str | None]) -> set[Capability]:
    """Return the capabilities, of tools and reasoning, that a model's templates show."""
    capabilities = set()
    for template in templates:
        if TOOLS.search(template or ""):
            capabilities.add(Capability.TOOLS)
        if "<think>" in (template or ""):
            capabilities.add(Capability.REASONING)
    return capabilities
