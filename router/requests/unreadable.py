"""Parts of messages that text models cannot read: a note in a history, an error in a question."""

from collections.abc import Iterable

from core.errors import UnsupportedCapability
from core.text import escaped

_NAMES = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "audio": "a sound",
    "input_audio": "a sound",
    "video_url": "a video",
    "file": "a file",
    "input_file": "a file",
}
_SEEN = ("image", "video")


class UnreadableParts:
    """Replaces unreadable parts of one request; `names` are those for `x-impetus-ignored`.

    A part that the user sends now must be readable.  One further back, or in a tool's result, would
    end the session if it were refused, since it is in every later request as well.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def note(self, kind: str, param: str, *, is_asked: bool) -> str:
        """Return the text in the place of a part of type `kind`.

        `is_asked`: it is in the user's last message.  Raises UnsupportedCapability then.
        """
        shown = escaped(kind, 50)
        if is_asked:
            raise UnsupportedCapability(
                f"{param}: content of type {shown!r} is not supported: no model on this server "
                "reads more than text. Leave it out, or send its content as text.",
                param=param,
            )
        self.names.add(f"messages.content.{shown}")
        name = _NAMES.get(kind, f"content of type {shown}")
        return f"[{name}, which this model cannot {'see' if _is_seen(kind) else 'read'}]"


def _is_seen(kind: str) -> bool:
    return any(word in kind for word in _SEEN)


def last_question(roles: Iterable[str]) -> int:
    """Return the index of the user's last message, or -1 if there is none."""
    return max((index for index, role in enumerate(roles) if role == "user"), default=-1)
