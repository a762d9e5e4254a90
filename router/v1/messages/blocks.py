"""Reads Anthropic's content blocks as text; blocks without readable text become a short note.

Source: the block types of Anthropic's Python SDK, `types/beta/beta_content_block_param.py`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from router.requests.unreadable import (
    UnreadableParts,
    decoded_text,
    document_text,
    text_or_empty,
)
from router.v1.messages import request as messages_api

# Blocks for Anthropic's servers only, without meaning for a model.
_OPAQUE = frozenset({"fallback", "mcp_tool_listing", "redacted_thinking"})
_CALLS = frozenset({"server_tool_use", "mcp_tool_use"})
_TEXT_FIELDS = ("title", "url", "text", "content", "stdout", "stderr", "tool_name", "error_code")
_NESTED_FIELDS = ("tool_references", "lines")
_SHOWN_CHARACTERS = 200


class BlockReader:
    """Reads the blocks of one request; `unreadable` knows those that became notes."""

    def __init__(self) -> None:
        self.unreadable = UnreadableParts()

    def text(self, block: messages_api.Block, param: str, *, is_asked: bool) -> str:
        """Return the block's text.

        `is_asked`: the user's last message contains the block itself.  Raises UnsupportedCapability
        then for what cannot be read, and RequestError for a text block without text.
        """
        if block.type == "text":
            return text_or_empty(block.text, f"{param}.text", is_asked=is_asked)
        if block.type in _OPAQUE:
            return ""
        fields = block.model_dump(exclude_unset=True)
        if block.type == "document":
            return self._document(fields, param, is_asked=is_asked)
        text = _block_text(block, fields)
        if text is None:
            return self.unreadable.note(block.type, param, is_asked=is_asked)
        return text

    def _document(self, fields: Mapping[str, Any], param: str, *, is_asked: bool) -> str:
        title = fields.get("title")
        text = self._source_text(fields.get("source"), param, is_asked=is_asked)
        if text is None:
            return self.unreadable.note("document", param, is_asked=is_asked, title=title)
        return document_text(title, text, fields.get("context"))

    def _source_text(self, source: object, param: str, *, is_asked: bool) -> str | None:
        """Return the text of a document's source; None for PDFs, addresses and files."""
        if not isinstance(source, dict):
            return None
        match source.get("type"), source.get("data"), source.get("content"):
            case "text", str(data), _:
                return data
            case "base64", str(data), _ if str(source.get("media_type")).startswith("text/"):
                return decoded_text(data)
            case "content", _, str(content):
                return content
            case "content", _, list(content):
                return "\n".join(
                    self._part(part, param, is_asked=is_asked)
                    for part in content
                    if isinstance(part, dict)
                )
        return None

    def _part(self, part: Mapping[str, Any], param: str, *, is_asked: bool) -> str:
        text = part.get("text")
        if isinstance(text, str):
            return text
        return self.unreadable.note(str(part.get("type")), param, is_asked=is_asked)


def _block_text(block: messages_api.Block, fields: Mapping[str, Any]) -> str | None:
    """Return the text of a block that has some; None for images, files and unknown types."""
    match block.type:
        case "search_result":
            heading = f"Search result: {_shown(fields.get('title'))}"
            return f"{heading} ({_shown(fields.get('source'))})\n{_joined(block.content)}"
        case "compaction":
            return _joined(block.content)
        case "tool_reference" | "tool_addition":
            return f"[the tool {_tool_name(fields)} is available]"
        case "tool_removal":
            return f"[the tool {_tool_name(fields)} is no longer available]"
        case "browser_state":
            return f"Browser tabs: {json.dumps(fields.get('tabs'), ensure_ascii=False)}"
        case kind if kind in _CALLS:
            arguments = json.dumps(block.input, ensure_ascii=False)
            return f"[the tool {_shown(block.name)} was called with {arguments}]"
        case kind if kind.endswith("_tool_result"):
            return f"[result of {_shown(kind.removesuffix('_tool_result'))}]\n{_joined(fields)}"
    return None


def _joined(value: object) -> str:
    return "\n".join(text for text in _texts(value) if text)


def _texts(value: object) -> Iterator[str]:
    """Yield the readable texts in a server tool's result; encrypted fields are left out."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _texts(item)
        case dict():
            for name in (*_TEXT_FIELDS, *_NESTED_FIELDS):
                yield from _texts(value.get(name))
            source = value.get("source")
            if isinstance(source, dict) and source.get("type") == "text":
                yield from _texts(source.get("data"))
        case messages_api.Block():
            yield from _texts(value.model_dump(exclude_unset=True))


def _tool_name(fields: Mapping[str, Any]) -> str:
    """Return the name in a reference to a tool, or in a definition of one."""
    named = fields
    for _ in range(2):
        for key in ("tool_name", "name", "mcp_server_name"):
            if isinstance(named.get(key), str):
                return _shown(named[key])
        inner = named.get("tool", named.get("definition"))
        named = inner if isinstance(inner, dict) else {}
    return _shown(named.get("name"))


def _shown(value: object) -> str:
    return value[:_SHOWN_CHARACTERS] if isinstance(value, str) else "without a name"
