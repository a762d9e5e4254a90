"""Changes the order of roles in a conversation, for templates that accept only certain ones."""

from collections.abc import Sequence
from dataclasses import replace

from core.types import ChatMessage

_OPENING = "Please continue."


def with_leading_system(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Join the leading system messages, and give later ones to the user, where they stand."""
    count = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    leading = messages[:count]
    joined = (
        [ChatMessage("system", "\n\n".join(message.content for message in leading))]
        if len(leading) > 1
        else leading
    )
    later = (replace(m, role="user") if m.role == "system" else m for m in messages[count:])
    return (*joined, *later)


def with_leading_user(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Let the user speak first: templates need a question, and some conversations have none."""
    count = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    if count < len(messages) and messages[count].role == "user":
        return tuple(messages)
    return (*messages[:count], ChatMessage("user", _OPENING), *messages[count:])


def without_empty_answers(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Drop the assistant's messages without text and calls, as interrupted answers leave them."""
    return tuple(
        message
        for message in messages
        if message.role != "assistant" or message.content.strip() or message.tool_calls
    )


def with_joined_turns(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Join neighbouring messages of one role, unless an earlier one has calls or is a result."""
    groups: list[list[ChatMessage]] = []
    for message in messages:
        last = groups[-1][-1] if groups else None
        if last and last.role == message.role and last.role != "tool" and not last.tool_calls:
            groups[-1].append(message)
        else:
            groups.append([message])
    return tuple(_joined(group) for group in groups)


def _joined(group: Sequence[ChatMessage]) -> ChatMessage:
    if len(group) == 1:
        return group[0]
    reasoning = [message.reasoning for message in group if message.reasoning]
    return replace(
        group[-1],
        content="\n\n".join(message.content for message in group if message.content),
        reasoning="\n\n".join(reasoning) or None,
    )
