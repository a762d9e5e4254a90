"""Reads the parts of items as text; parts without readable text become a short note."""

from collections.abc import Sequence

from router.requests.unreadable import (
    UnreadableParts,
    document_text,
    text_of_data_url,
    text_or_empty,
)
from router.v1.responses import request as responses_api

_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


class PartReader:
    """Reads the parts of one request; `unreadable` knows those that became notes."""

    def __init__(self) -> None:
        self.unreadable = UnreadableParts("input.content")

    def joined(
        self,
        content: str | Sequence[responses_api.Part] | None,
        param: str,
        *,
        is_asked: bool = False,
    ) -> str:
        """Return the content's text.

        `is_asked`: it is the user's last message.  Raises UnsupportedCapability then for what
        cannot be read, and RequestError where content or text is missing.
        """
        if content is None or isinstance(content, str):
            return text_or_empty(content, param, is_asked=is_asked)
        parts = enumerate(content)
        return "\n".join(
            self._text(part, f"{param}[{index}]", is_asked=is_asked) for index, part in parts
        )

    def _text(self, part: responses_api.Part, param: str, *, is_asked: bool) -> str:
        if part.type == "refusal":
            return text_or_empty(part.refusal, f"{param}.refusal", is_asked=is_asked)
        if part.type in _TEXTS:
            return text_or_empty(part.text, f"{param}.text", is_asked=is_asked)
        fields = part.model_extra or {}
        name = fields.get("filename")
        text = text_of_data_url(fields.get("file_data"))
        if text is not None:
            return document_text(name, text)
        return self.unreadable.note(part.type, param, is_asked=is_asked, title=name)
