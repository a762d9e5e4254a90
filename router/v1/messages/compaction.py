"""Summaries of conversations: what `compaction` of Anthropic's Messages API asks for.

Source: Anthropic's Python SDK, `types/beta/beta_compaction_config_param.py` and
`types/beta/beta_compaction_block.py`.
"""

from collections.abc import Iterable
from dataclasses import replace

from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    GenerationEvent,
    JsonValue,
    PrefillProgress,
    TextDelta,
)
from router.answers.parts import Part
from router.requests.reasoning import with_reasoning

_INSTRUCTIONS = (
    "Write a summary of the conversation so far, from which it can be continued without the "
    "messages themselves: what the user wants, what was done and found, with names, files, values "
    "and decisions, and what is left to do. Answer with the summary alone."
)


def summarizing(prompt: ChatPrompt, instructions: str | None) -> ChatPrompt:
    """Return the prompt that asks for a summary of a conversation; blank instructions mean none."""
    asked = instructions if instructions and instructions.strip() else _INSTRUCTIONS
    asking = replace(
        prompt,
        messages=(*prompt.messages, ChatMessage("user", asked)),
        tools=(),
        tool_choice="auto",
        continues_answer=False,
    )
    return with_reasoning(asking, is_on=False)


def summary_events(events: Iterable[GenerationEvent]) -> list[GenerationEvent]:
    """Return the events that make up the summary, without reasoning."""
    return [event for event in events if is_of_summary(event)]


def is_of_summary(event: GenerationEvent) -> bool:
    """Whether an event is text of the summary, or the answer's progress or end."""
    return isinstance(event, TextDelta | Finished | PrefillProgress)


def compaction_block(parts: Iterable[Part]) -> dict[str, JsonValue]:
    """Return the block with a summary; null if there is none."""
    text = "".join(part.text for part in parts)
    return {"type": "compaction", "content": text or None, "encrypted_content": None}


def compaction_ending(ending: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the ending of a complete summary; one that was cut keeps its reason."""
    is_whole = ending["stop_reason"] == "end_turn"
    return {**ending, "stop_reason": "compaction"} if is_whole else ending
