"""Stores responses in bounded memory for `previous_response_id` and `item_reference`."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from core.types import ChatMessage

# Rough overhead of the Python objects around a message's texts.
_MESSAGE_BYTES = 256
_ITEM_BYTES = 384


@dataclass(frozen=True, slots=True, eq=False)
class StoredItem:
    """An item of an answer or of its input, as JSON with its id."""

    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer as it was sent, and the conversation up to and including it.

    `inputs` are all items before the answer, those of previous responses too.
    """

    body: bytes
    conversation: tuple[ChatMessage, ...]
    inputs: tuple[StoredItem, ...] = ()
    outputs: tuple[StoredItem, ...] = ()


class ResponseStore:
    """LRU store of at most `max_count` answers with `max_bytes` in total.

    Conversations that share messages or items share their memory, and what is shared counts once.
    An item is known by its id as long as any answer holds it.  An answer larger than the whole
    store is not stored.  A restart empties the store.  Thread-safe.
    """

    def __init__(self, *, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._uses: dict[int, int] = {}
        self._items: dict[str, StoredItem] = {}
        self.used_bytes = 0
        # Large requests are converted by a thread, which looks conversations up.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._responses)

    def put(
        self,
        response_id: str,
        body: bytes,
        conversation: Sequence[ChatMessage],
        inputs: Sequence[StoredItem] = (),
        outputs: Sequence[StoredItem] = (),
    ) -> None:
        """Store an answer, evicting the least recently used ones."""
        stored = StoredResponse(body, tuple(conversation), tuple(inputs), tuple(outputs))
        if len(body) + sum(_size(part) for part in _parts(stored)) > self._max_bytes:
            return
        with self._lock:
            self._responses[response_id] = stored
            self._count(stored, 1)
            # Ids that clients chose never hide an answer's own.
            self._items.update({item.id: item for item in reversed(stored.outputs)})
            for item in stored.inputs:
                self._items.setdefault(item.id, item)
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

    def item(self, item_id: str) -> StoredItem | None:
        """Return an item of any stored answer or of its input."""
        with self._lock:
            return self._items.get(item_id)

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
        for part in _parts(stored):
            # The store holds the part for as long as its identity is a key here.
            key = id(part)
            uses = self._uses.get(key, 0) + change
            if uses and uses != change:
                self._uses[key] = uses
                continue
            self.used_bytes += change * _size(part)
            if uses:
                self._uses[key] = uses
                continue
            del self._uses[key]
            if isinstance(part, StoredItem) and self._items.get(part.id) is part:
                del self._items[part.id]


def _parts(stored: StoredResponse) -> Iterator[ChatMessage | StoredItem]:
    yield from stored.conversation
    yield from stored.inputs
    yield from stored.outputs


def _size(part: ChatMessage | StoredItem) -> int:
    if isinstance(part, StoredItem):
        return _ITEM_BYTES + 4 * len(part.id) + len(part.body)
    calls = part.tool_calls
    texts: Iterable[str | None] = (
        part.content,
        part.reasoning,
        *(text for call in calls for text in (call.id, call.name, call.arguments)),
    )
    # At most four bytes per character.
    return _MESSAGE_BYTES * (1 + len(calls)) + 4 * sum(len(text) for text in texts if text)
