"""Reasoning effort and token budget: maps the fields of all APIs to the prompt's."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, TypeAlias

from pydantic import Field

from core.errors import RequestError
from core.types import Capability, ChatPrompt, JsonValue
from router.requests.fields import Effort, RequestPart, WholeNumber
from router.requests.limits import MAX_INT32
from router.services import ModelView

# Chat templates know three levels: low, medium, high.
_DEGREES = {"minimal": "low", "xhigh": "high", "max": "high"}

ReasoningTokens: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT32), WholeNumber]


class Reasoning(RequestPart):
    """OpenAI's and OpenRouter's `reasoning`: an effort, or a budget in tokens."""

    effort: Effort | None = None
    max_tokens: ReasoningTokens | None = None


def merge_effort(effort: Effort | None, reasoning: Reasoning | None) -> Effort | None:
    """Return the effort of `reasoning_effort` or `reasoning`.  Raises RequestError."""
    named = {effort, reasoning.effort if reasoning is not None else None} - {None}
    if len(named) > 1:
        raise RequestError(
            "reasoning.effort: differs from reasoning_effort; send one", param="reasoning.effort"
        )
    return next(iter(named), None)


def merge_budget(budget: int | None, reasoning: Reasoning | None) -> int | None:
    """Return the budget of `thinking_budget` or `reasoning`; raises RequestError if they differ."""
    named = {budget, reasoning.max_tokens if reasoning is not None else None} - {None}
    if len(named) > 1:
        raise RequestError(
            "reasoning.max_tokens: differs from thinking_budget; send one",
            param="reasoning.max_tokens",
        )
    return next(iter(named), None)


def with_reasoning(
    prompt: ChatPrompt,
    *,
    is_on: bool | None = None,
    effort: Effort | None = None,
    budget_tokens: int | None = None,
) -> ChatPrompt:
    """Return `prompt` with reasoning switch, effort and budget; None leaves it to the model.

    Agents send these for every model, so they are only hints to the chat template: a template that
    does not use them is unaffected.
    """
    variables: dict[str, JsonValue] = {}
    if is_on is None and effort is not None:
        is_on = effort != "none"
    if is_on is not None:
        # The two names that templates have for the switch.
        variables |= {"enable_thinking": is_on, "thinking": is_on}
    if is_on and effort is not None and effort != "none":
        variables["reasoning_effort"] = _DEGREES.get(effort, effort)
    return replace(
        prompt,
        template_kwargs={**variables, **prompt.template_kwargs},
        reasoning_tokens=budget_tokens,
    )


def for_model(prompt: ChatPrompt, view: ModelView) -> ChatPrompt:
    """Return `prompt` without reasoning effort and budget if the model does not reason."""
    if Capability.REASONING in view.capabilities:
        return prompt
    return replace(prompt, reasoning_effort=None, reasoning_tokens=None)


def unused_effort(view: ModelView, efforts: Mapping[str, str | None]) -> list[str]:
    """Return the fields of `efforts` that change nothing for this model, to be named as ignored.

    Without reasoning "none" is what happens anyway.
    """
    if Capability.REASONING in view.capabilities:
        return []
    return [name for name, effort in efforts.items() if effort not in (None, "none")]


def encode_reasoning(reasoning: str) -> str:
    """Return reasoning as opaque base64 text that a client sends back without showing it."""
    return base64.b64encode(reasoning.encode()).decode("ascii")


def decode_reasoning(text: str) -> str | None:
    """Return the reasoning that `encode_reasoning` encoded; None for text of another server."""
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, ValueError):
        return None
