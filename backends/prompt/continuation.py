"""Continues an answer that the conversation has begun (prefill): where its text ends, and how."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from backends.answer.reasoning import ReasoningTags
from core.errors import UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, Tool

# Stands for the begun answer while the template renders, as templates trim and split contents.
_MARK = "\u27e6the-begun-answer\u27e7"
_CALLED = re.compile(r'"name"\s*:\s*("[^"\\\x00-\x1f]*")')


def begun_text(prompt: ChatPrompt, tags: ReasoningTags | None) -> str:
    """Return the text that the answer continues; begun reasoning without text is kept open."""
    if not prompt.continues_answer or not prompt.messages:
        return ""
    last = prompt.messages[-1]
    if not last.content and last.reasoning and tags is not None:
        return f"{tags.open}\n{last.reasoning}"
    return last.content


def with_mark(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages with a mark in place of the begun answer."""
    last = messages[-1]
    reasoning = last.reasoning if last.content else None
    return (*messages[:-1], replace(last, content=_MARK, reasoning=reasoning))


def continued(rendered: str, begun: str) -> str:
    """Return the prompt up to the mark, and then the begun answer.

    Raises UnsupportedParameter if the template left the mark out.
    """
    head, mark, _ = rendered.rpartition(_MARK)
    if not mark:
        raise UnsupportedParameter(
            "messages: this model's chat template cannot continue a begun answer; end the "
            "conversation with a user's message.",
            param="messages",
        )
    return head + begun


def is_in_call(begun: str, starts: Sequence[str], end: str, tools: Sequence[Tool]) -> bool:
    """Return whether begun text ends within a call of `tools`, with markers or as bare JSON.

    `starts` and `end` are the markers of a call; without an end it lasts to the end of the answer.
    """
    at = max((begun.rfind(start) for start in starts), default=-1)
    if at >= 0 and not (end and end in begun[at:]):
        return True
    if not begun.lstrip().startswith("{"):
        return False
    try:
        json.loads(begun)
    except (ValueError, RecursionError):
        named = {json.loads(name) for name in _CALLED.findall(begun)}
        return any(tool.name in named for tool in tools)
    return False


def is_reasoning(rendered: str, begun: str, tags: ReasoningTags) -> bool:
    """Return whether the answer goes on inside reasoning."""
    opened, closed = begun.rfind(tags.open), begun.rfind(tags.close)
    if opened != closed:
        return opened > closed
    return rendered.removesuffix(begun).rstrip().endswith(tags.open)


def begun_output(begun: str, tags: ReasoningTags | None) -> str:
    """Return the part of a begun answer that a grammar covers: what follows its last marker."""
    if tags is None:
        return begun
    ends = [begun.rfind(tag) + len(tag) for tag in (tags.open, tags.close) if tag in begun]
    return begun[max(ends, default=0) :].lstrip()
