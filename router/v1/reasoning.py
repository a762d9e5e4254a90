"""How much a model shall reason, as the several APIs ask for it."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from core.errors import RequestError
from router.v1.wire import MAX_INT32, WireModel

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ReasoningTokens: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT32)]


class Reasoning(WireModel):
    """OpenAI's and OpenRouter's `reasoning`: an effort, or a bound in tokens."""

    effort: Effort | None = None
    max_tokens: ReasoningTokens | None = None


def one_effort(effort: Effort | None, reasoning: Reasoning | None) -> Effort | None:
    """Return the effort that `reasoning_effort` or `reasoning` names.  Raises RequestError."""
    named = {effort, reasoning.effort if reasoning is not None else None} - {None}
    if len(named) > 1:
        raise RequestError(
            "reasoning.effort: differs from reasoning_effort; send one", param="reasoning.effort"
        )
    return next(iter(named), None)


def one_bound(budget: int | None, reasoning: Reasoning | None) -> int | None:
    """Return the bound that `thinking_budget` or `reasoning` names.  Raises RequestError."""
    named = {budget, reasoning.max_tokens if reasoning is not None else None} - {None}
    if len(named) > 1:
        raise RequestError(
            "reasoning.max_tokens: differs from thinking_budget; send one",
            param="reasoning.max_tokens",
        )
    return next(iter(named), None)
