"""Reads the parts of items as text; parts without readable text become a short note."""

import base64
import binascii
from collections.abc import Sequence

from core.errors import RequestError, UnsupportedCapability
from core.text import escaped
from router.v1.responses import request as responses_api

_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
_IMAGES = frozenset({"input_image", "output_image", "image", "image_url", "computer_screenshot"})
_NAMES = {"input_file": "a file", "file": "a file", "input_audio": "audio", "output_audio": "audio"}
_SHOWN_CHARACTERS = 200


class PartReader:
    """Reads the parts of one request; `noted` are the types of the parts that became notes.

    A part that the user sends now must be readable.  An unreadable one further back, or in a
    tool's result, would end the session for good if it were refused, so a note takes its place.
    """

    def __init__(self) -> None:
        self.noted: set[str] = set()

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
        if isinstance(content, str):
            return content
        if content is None:
            raise RequestError(f"{param}: required", param=param)
        parts = enumerate(content)
        return "\n".join(
            self._text(part, f"{param}[{index}]", is_asked=is_asked) for index, part in parts
        )

    def _text(self, part: responses_api.Part, param: str, *, is_asked: bool) -> str:
        if part.type in _TEXTS or part.type == "refusal":
            name = "refusal" if part.type == "refusal" else "text"
            text = part.refusal if part.type == "refusal" else part.text
            if text is None:
                raise RequestError(f"{param}.{name}: required", param=f"{param}.{name}")
            return text
        fields = part.model_extra or {}
        filename = fields.get("filename")
        name = filename[:_SHOWN_CHARACTERS] if isinstance(filename, str) else ""
        data = fields.get("file_data")
        if isinstance(data, str) and (text := _file_text(data)) is not None:
            return f"Document: {name}\n{text}" if name else text
        return self._unreadable(part.type[:50], name, param, is_asked=is_asked)

    def _unreadable(self, kind: str, name: str, param: str, *, is_asked: bool) -> str:
        """Return a note in the part's place, or refuse it."""
        if is_asked:
            raise UnsupportedCapability(
                f"{param}: parts of type {kind!r} are not supported here: no model on this server "
                "reads more than text. Leave the part out, or send its content as text.",
                param=param,
            )
        self.noted.add(kind)
        if kind in _IMAGES:
            return IMAGE_NOTE
        what = _NAMES.get(kind) or f"a part of type {escaped(kind)}"
        named = f" named {name}" if name else ""
        return f"[{what}{named}, which this model cannot read]"


IMAGE_NOTE = "[an image, which this model cannot see]"


def _file_text(data: str) -> str | None:
    """Return the text in the data URL of a text file; None for other files."""
    head, _, encoded = data.partition(",")
    if not (head.startswith("data:text/") and head.endswith(";base64")):
        return None
    try:
        return base64.b64decode(encoded).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return None
