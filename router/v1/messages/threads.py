"""Stores conversations in bounded memory for the `thread` field of Anthropic's Messages API.

Source: Anthropic's Python SDK, `types/beta/beta_message_thread_param.py` and `lib/threads/`.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import ThreadNotFound, ThreadUnsupported
from core.types import ChatMessage, Tool

# Rough overhead of the Python objects around a message's or a tool's texts.
_OBJECT_BYTES = 256


@dataclass(frozen=True, slots=True)
class KeptThread:
    """A conversation up to and including an answer, with what the client sends only once."""

    system: tuple[ChatMessage, ...] = ()
    tools: tuple[Tool, ...] = ()
    messages: tuple[ChatMessage, ...] = ()


EMPTY = KeptThread()


class ThreadStore:
    """LRU store of at most `max_count` conversations with `max_bytes` in total.

    Each is kept under the id of its last answer.  One that was continued is kept too, so that the
    same turn can be sent again, but it is dropped first.  A conversation larger than the whole
    store is not kept.  A restart empties the store.  Thread-safe.
    """

    def __init__(self, *, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._threads: OrderedDict[str, tuple[KeptThread, int]] = OrderedDict()
        self.used_bytes = 0
        # Large requests are converted by a thread, which looks conversations up.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._threads)

    def check_keeps(self) -> None:
        """Raise ThreadUnsupported if the store is off; Anthropic's SDK then sends everything."""
        if not (self._max_count and self._max_bytes):
            raise ThreadUnsupported(
                "thread: this server keeps no conversations (IMPETUS_STORED_RESPONSES is 0); send "
                "the whole conversation without thread.",
                param="thread",
            )

    def put(self, message_id: str, thread: KeptThread, previous_id: str | None) -> None:
        """Keep the conversation that ends with the answer `message_id`, after `previous_id`."""
        size = _size(thread)
        if size > self._max_bytes:
            return
        with self._lock:
            if previous_id is not None and previous_id in self._threads:
                self._threads.move_to_end(previous_id, last=False)
            self._threads[message_id] = (thread, size)
            self.used_bytes += size
            while len(self._threads) > self._max_count or self.used_bytes > self._max_bytes:
                _, (_, dropped) = self._threads.popitem(last=False)
                self.used_bytes -= dropped

    def get(self, message_id: str) -> KeptThread:
        """Return a conversation and mark it as recently used.  Raises ThreadNotFound."""
        self.check_keeps()
        with self._lock:
            if message_id in self._threads:
                self._threads.move_to_end(message_id)
                return self._threads[message_id][0]
        raise ThreadNotFound(
            f"thread.previous_message_id: no conversation is kept under {message_id[:100]!r}; send "
            'the whole conversation with thread {"type": "create"}.',
            param="thread.previous_message_id",
        )


def _size(thread: KeptThread) -> int:
    """Return about how many bytes a conversation takes, at most four per character."""
    texts: Iterable[str | None] = (
        text
        for message in (*thread.system, *thread.messages)
        for text in (
            message.content,
            message.reasoning,
            message.tool_call_id,
            *(part for call in message.tool_calls for part in (call.id, call.name, call.arguments)),
        )
    )
    tools = sum(
        len(tool.name) + len(tool.description) + len(json.dumps(tool.parameters))
        for tool in thread.tools
    )
    objects = len(thread.system) + len(thread.messages) + len(thread.tools)
    objects += sum(len(message.tool_calls) for message in thread.messages)
    return _OBJECT_BYTES * (1 + objects) + 4 * (tools + sum(len(text) for text in texts if text))
