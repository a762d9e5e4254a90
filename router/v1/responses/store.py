"""Stores responses in bounded memory for `previous_response_id`."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.types import ChatMessage

# Rough overhead of the Python objects around a message's texts.
_MESSAGE_BYTES = 256


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer as it was sent, and the conversation up to and including it."""

    body: bytes
    conversation: tuple[ChatMessage, ...]


class ResponseStore:
    """LRU store of at most `max_count` answers with `max_bytes` in total.

    Conversations that share messages share their memory, and a shared message counts once.  An
    answer larger than the whole store is not stored.  A restart empties the store.  Thread-safe.
    """

    def __init__(self, *, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._uses: dict[int, int] = {}
        self.used_bytes = 0
        # Large requests are converted by a thread, which looks conversations up.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response_id: str, body: bytes, conversation: Sequence[ChatMessage]) -> None:
        """Store an answer, evicting the least recently used ones."""
        stored = StoredResponse(body, tuple(conversation))
        if len(body) + sum(map(_size, conversation)) > self._max_bytes:
            return
        with self._lock:
            self._responses[response_id] = stored
            self._count(stored, 1)
            while len(self._responses) > self._max_count or self.used_bytes > self._max_bytes:
                _, oldest = self._responses.popitem(last=False)
                self._count(oldest, -1)

    def get(self, response_id: str) -> StoredResponse | None:
        """Return an answer and mark it as recently used."""
        with self._lock:
            stored = self._responses.get(response_id)
            if stored is not None:
                self._responses.move_to_end(response_id)
            return stored

    def delete(self, response_id: str) -> bool:
        """Delete an answer; its follow-ups keep their conversation.  Returns False if unknown."""
        with self._lock:
            stored = self._responses.pop(response_id, None)
            if stored is None:
                return False
            self._count(stored, -1)
            return True

    def _count(self, stored: StoredResponse, change: int) -> None:
        self.used_bytes += change * len(stored.body)
        for message in stored.conversation:
            # The store holds the message for as long as its identity is a key here.
            key = id(message)
            uses = self._uses.get(key, 0) + change
            if uses and uses != change:
                self._uses[key] = uses
                continue
            self.used_bytes += change * _size(message)
            if uses:
                self._uses[key] = uses
            else:
                del self._uses[key]


def _size(message: ChatMessage) -> int:
    calls = message.tool_calls
    texts: Iterable[str | None] = (
        message.content,
        message.reasoning,
        *(text for call in calls for text in (call.id, call.name, call.arguments)),
    )
    # At most four bytes per character.
    return _MESSAGE_BYTES * (1 + len(calls)) + 4 * sum(len(text) for text in texts if text)
