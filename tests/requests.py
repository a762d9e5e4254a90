"""Requests and what comes back of them, for tests of engines."""

from collections.abc import Sequence
from itertools import count
from typing import Any

from backends.base import Engine
from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Output,
    Prompt,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenRules,
)

_ids = count()


def chat(text: str, **options: Any) -> ChatPrompt:
    """Return a prompt of one user message."""
    return ChatPrompt((ChatMessage("user", text),), **options)


def request(
    prompt: Prompt | str,
    *,
    max_tokens: int | None = 24,
    stop: Sequence[str] = (),
    output: Output | None = None,
    deadline_s: float | None = None,
    echo_prompt: bool = False,
    rules: TokenRules | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """Return a greedy request unless `sampling` says otherwise."""
    sampling.setdefault("temperature", 0.0)
    return GenerationRequest(
        id=f"test-{next(_ids)}",
        model_id="model",
        prompt=TextPrompt(prompt) if isinstance(prompt, str) else prompt,
        sampling=SamplingParams(**sampling),
        max_tokens=max_tokens,
        stop=tuple(stop),
        output=output,
        deadline_s=deadline_s,
        echo_prompt=echo_prompt,
        rules=rules,
    )


async def run(engine: Engine, wanted: GenerationRequest) -> list[GenerationEvent]:
    """Return all events of a request."""
    return [event async for event in engine.generate(wanted)]


def text_of(events: Sequence[GenerationEvent]) -> str:
    """Return the answer's text."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def token_ids_of(events: Sequence[GenerationEvent]) -> list[int]:
    """Return the ids of all generated tokens that events carried."""
    return [token_id for event in events for token_id in getattr(event, "token_ids", ())]


def end_of(events: Sequence[GenerationEvent]) -> Finished:
    """Return the last event."""
    end = events[-1]
    assert isinstance(end, Finished)
    return end


def assert_same_tokens(
    expected: Sequence[GenerationEvent], actual: Sequence[GenerationEvent], *, tie: float = 0.05
) -> None:
    """Compare greedy tokens of two runs with `top_logprobs=2`.

    Another batch adds numbers in another order, so where the two likeliest tokens are less than
    `tie` apart the second may win; what follows is another text then.
    """
    entries = [e for event in expected if isinstance(event, TextDelta) for e in event.logprobs]
    for entry, ids in zip(entries, token_ids_of(actual), strict=False):
        if ids == entry.token_id:
            continue
        first, second = entry.top
        assert ids == second.token_id
        assert first.logprob - second.logprob < tie
        return
    assert text_of(actual) == text_of(expected)
