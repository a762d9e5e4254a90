"""Rewrites the ids of tool calls to nine letters and digits, which Mistral's templates demand."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from core.types import ChatMessage

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LENGTH = 9
_ACCEPTED = re.compile(r"[A-Za-z0-9]{9}")


def with_short_call_ids(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages with ids of nine letters or digits, the same for a call and its result.

    An id depends on the old one only, unless two collide, so that the prompt of the next turn
    begins like this one's.  Ids in that form are kept.
    """
    names = _Names(messages)
    return tuple(
        replace(
            message,
            tool_calls=tuple(replace(call, id=names.of(call.id)) for call in message.tool_calls),
            tool_call_id=names.of(message.tool_call_id or "")
            if message.role == "tool"
            else message.tool_call_id,
        )
        for message in messages
    )


class _Names:
    def __init__(self, messages: Sequence[ChatMessage]) -> None:
        ids = [call.id for message in messages for call in message.tool_calls]
        ids += [message.tool_call_id or "" for message in messages if message.role == "tool"]
        self._new = {old: old for old in ids if _ACCEPTED.fullmatch(old)}
        self._taken = set(self._new)

    def of(self, old: str) -> str:
        """Return the id in the place of `old`."""
        attempt = 0
        while old not in self._new:
            new = _short(f"{old} {attempt}" if attempt else old)
            attempt += 1
            if new not in self._taken:
                self._new[old] = new
                self._taken.add(new)
        return self._new[old]


def _short(text: str) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8])
    letters = []
    for _ in range(_LENGTH):
        number, index = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[index])
    return "".join(letters)
