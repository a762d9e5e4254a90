"""Named chat templates: which a model may have beside its default one, and what they say of it."""

import re
from collections.abc import Iterable

from core.types import Capability

# Source: transformers' `get_chat_template`, llama.cpp, and Command R's files.
TOOL_USE, RAG = "tool_use", "rag"
_TOOLS = re.compile(r"\btools\b")
_DOCUMENTS = re.compile(r"\bdocuments\b")


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
    return _names(template, _TOOLS)


def reads_documents(template: str) -> bool:
    """Return whether a template names the variable `documents`, other than in a comment."""
    return _names(template, _DOCUMENTS)


def _names(template: str, variable: re.Pattern[str]) -> bool:
    start = 0
    while (opened := template.find("{#", start)) >= 0:
        if variable.search(template, start, opened):
            return True
        closed = template.find("#}", opened + 2)
        if closed < 0:
            return False
        start = closed + 2
    return variable.search(template, start) is not None
