"""Parts of messages that text models cannot read: a note in a history, an error in a question.

The same rule, wording and names for chat completions, the Responses API and the Messages API.
"""

import base64
import binascii
import re
from collections.abc import Iterable

from core.errors import RequestError, UnsupportedCapability
from core.text import escaped

_IMAGE, _SOUND, _VIDEO, _FILE = "an image", "a sound", "a video", "a file"
_NAMES = {
    "image": _IMAGE,
    "image_url": _IMAGE,
    "input_image": _IMAGE,
    "output_image": _IMAGE,
    "computer_screenshot": _IMAGE,
    "audio": _SOUND,
    "audio_url": _SOUND,
    "input_audio": _SOUND,
    "output_audio": _SOUND,
    "video": _VIDEO,
    "video_url": _VIDEO,
    "input_video": _VIDEO,
    "file": _FILE,
    "input_file": _FILE,
    "document": "a document",
    "container_upload": "an uploaded file",
}
_SEEN = ("image", "video", "screenshot")
_KIND_CHARACTERS = 50
_TITLE_CHARACTERS = 200
_DATA_URL = re.compile(r"data:([a-z]+)/[\w.+-]+(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)


class UnreadableParts:
    """Replaces unreadable parts of one request; `names` are those for `x-impetus-ignored`.

    A part that the user sends now must be readable.  One further back, or in a tool's result, would
    end the session if it were refused, since it is in every later request as well.
    """

    def __init__(self, place: str = "messages.content") -> None:
        """`place` is the path of parts in a request, with which `names` begin."""
        self._place = place
        self.names: set[str] = set()

    def note(self, kind: str, param: str, *, is_asked: bool, title: object = None) -> str:
        """Return the text in place of a part of type `kind`; `title` is its name, if it is text.

        `is_asked`: it is in the user's last message.  Raises UnsupportedCapability then.
        """
        shown = escaped(kind, _KIND_CHARACTERS)
        if is_asked:
            raise UnsupportedCapability(
                f"{param}: content of type {shown!r} cannot be read: no model on this server reads "
                "more than text. Leave it out, or send its content as text.",
                param=param,
            )
        self.names.add(f"{self._place}.{shown}")
        name = _NAMES.get(kind, f"content of type {shown}")
        if isinstance(title, str) and title:
            name += f" named {escaped(title, _TITLE_CHARACTERS)}"
        is_seen = any(word in kind for word in _SEEN)
        return f"[{name}, which this model cannot {'see' if is_seen else 'read'}]"


def last_question(roles: Iterable[str]) -> int:
    """Return the index of the user's last message, or -1 if there is none."""
    return max((index for index, role in enumerate(roles) if role == "user"), default=-1)


def text_or_empty(text: str | None, param: str, *, is_asked: bool) -> str:
    """Return a text that may be missing in a history.  Raises RequestError where it is asked."""
    if text is None and is_asked:
        raise RequestError(f"{param}: required", param=param)
    return text or ""


def document_text(title: object, text: str, context: object = None) -> str:
    """Return a document's text below its title and context, as far as these are text."""
    heading = [f"Document: {title}"] if isinstance(title, str) and title else []
    heading += [context] if isinstance(context, str) and context else []
    return "\n".join([*heading, text])


def decoded_text(encoded: str) -> str | None:
    """Return the text of a file in base64; None for what is not base64."""
    try:
        return base64.b64decode(encoded).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return None


def text_of_data_url(url: object) -> str | None:
    """Return the text in the data URL of a text file; None for anything else."""
    head = _DATA_URL.match(url) if isinstance(url, str) else None
    if head is None or not isinstance(url, str) or head[1].lower() != "text":
        return None
    return decoded_text(url[head.end() :])


def kind_of_data_url(text: str) -> str | None:
    """Return `image`, `audio`, `video` or `file` for a data URL in base64; None for other text."""
    head = _DATA_URL.match(text)
    if head is None:
        return None
    kind = head[1].lower()
    return kind if kind in ("image", "audio", "video") else "file"
