"""Adapts conversations to chat templates that refuse them, or fail on them.

A template accepts what its model was trained on: alternating roles, one system message, one call at
a time, call ids in a certain form.  Each step changes one of these; only the steps that help are
applied, so that most of the prompt stays as the template would write it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from backends.prompt.call_ids import with_short_call_ids
from backends.prompt.call_results import with_paired_results, with_single_calls
from backends.prompt.messages import with_folded_system, with_tools_in_text
from backends.prompt.roles import (
    with_joined_turns,
    with_leading_system,
    with_leading_user,
    without_empty_answers,
)
from backends.prompt.templates import TemplateFailed
from backends.prompt.tool_schemas import plain_tools, with_object_arguments
from core.errors import BrokenModel, TemplateRefused
from core.types import ChatMessage, Tool

Text = TypeVar("Text")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()


_Step = Callable[[Conversation], Conversation]


def render_adapted(
    render: Callable[[Conversation], Text],
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool],
) -> Text:
    """Return what `render` makes of the conversation, adapted as little as its template needs.

    Steps are tried in order; one that leads to another error than before is kept for the next.  If
    that does not suffice, all of them are applied.  At most 13 renders.  Raises TemplateRefused
    with the first refusal, BrokenModel if the template fails on the plainest question too, and
    other errors of `render`.
    """
    given = Conversation(tuple(messages), tuple(tools))
    try:
        return render(given)
    except (TemplateRefused, TemplateFailed) as error:
        first: TemplateRefused | TemplateFailed = error
    reason, current = first.message, given
    for step in _STEPS:
        candidate = step(current)
        if candidate == current:
            continue
        try:
            return render(candidate)
        except (TemplateRefused, TemplateFailed) as error:
            if error.message != reason:
                reason, current = error.message, candidate
    try:
        return render(_plainest(given))
    except (TemplateRefused, TemplateFailed):
        raise _refusal(first, render) from None


def _refusal(
    first: TemplateRefused | TemplateFailed, render: Callable[[Conversation], object]
) -> TemplateRefused | BrokenModel:
    if isinstance(first, TemplateRefused):
        return first
    try:
        render(Conversation((ChatMessage("user", "Hello"),)))
    except (TemplateRefused, TemplateFailed):
        return first
    return TemplateRefused(
        f"These messages or tools do not fit the model: {first.message}. Send a shorter "
        "conversation, or simpler tools.",
        param="messages",
    )


def _plainest(given: Conversation) -> Conversation:
    """Return user and assistant in turns, with tools, calls and results as text."""
    messages = with_folded_system(with_tools_in_text(given.messages, given.tools))
    return Conversation(with_joined_turns(with_leading_user(without_empty_answers(messages))))


def _of_messages(
    change: Callable[[Sequence[ChatMessage]], tuple[ChatMessage, ...]],
) -> _Step:
    return lambda one: Conversation(change(one.messages), one.tools)


_STEPS: tuple[_Step, ...] = (
    _of_messages(with_object_arguments),
    lambda one: Conversation(one.messages, plain_tools(one.tools)),
    _of_messages(with_short_call_ids),
    _of_messages(with_leading_system),
    _of_messages(with_paired_results),
    _of_messages(with_single_calls),
    _of_messages(with_leading_user),
    _of_messages(without_empty_answers),
    _of_messages(with_joined_turns),
    _of_messages(with_folded_system),
    _of_messages(lambda messages: with_tools_in_text(messages, ())),
)
