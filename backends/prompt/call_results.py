"""Puts each tool result behind its call, for templates that accept them in no other order."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from backends.prompt.messages import TOOL_RESPONSE
from core.types import ChatMessage, ToolCall

_NO_RESULT = "The call has no result."


def with_paired_results(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages with every call's result right behind its message.

    A call without a result gets one that says so; a result without a call becomes the user's text.
    Results without an id belong to the earliest call that still lacks one.
    """
    owners = _owners(messages)
    results: dict[tuple[int, int], ChatMessage] = {
        owner: messages[index] for index, owner in owners.items()
    }
    paired: list[ChatMessage] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            if index not in owners:
                paired.append(ChatMessage("user", TOOL_RESPONSE.format(message.content)))
            continue
        paired.append(message)
        for place, call in enumerate(message.tool_calls):
            result = results.get((index, place)) or ChatMessage("tool", _NO_RESULT)
            paired.append(replace(result, tool_call_id=call.id))
    return tuple(paired)


def with_single_calls(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages with one call each, every one followed by its result."""
    if all(len(message.tool_calls) < 2 for message in messages):
        return tuple(messages)
    single: list[ChatMessage] = []
    calls: deque[ToolCall] = deque()
    for message in with_paired_results(messages):
        if message.tool_calls:
            first, *rest = message.tool_calls
            single.append(replace(message, tool_calls=(first,)))
            calls = deque(rest)
            continue
        # The results follow in the order of the calls: the first one's is here already.
        is_first = bool(single) and bool(single[-1].tool_calls)
        if message.role == "tool" and calls and not is_first:
            single.append(ChatMessage("assistant", "", tool_calls=(calls.popleft(),)))
        single.append(message)
    return tuple(single)


def _owners(messages: Sequence[ChatMessage]) -> dict[int, tuple[int, int]]:
    """Return for each result's index the message and the place of its call."""
    by_id: dict[str, deque[tuple[int, int]]] = {}
    order: deque[tuple[int, int]] = deque()
    answered: set[tuple[int, int]] = set()
    owners: dict[int, tuple[int, int]] = {}
    for index, message in enumerate(messages):
        for place, call in enumerate(message.tool_calls):
            by_id.setdefault(call.id, deque()).append((index, place))
            order.append((index, place))
        if message.role != "tool":
            continue
        candidates = by_id.get(message.tool_call_id, deque()) if message.tool_call_id else order
        while candidates and candidates[0] in answered:
            candidates.popleft()
        if candidates:
            owners[index] = candidates.popleft()
            answered.add(owners[index])
    return owners
