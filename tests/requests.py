"""Requests and what comes back of them, for tests of engines."""

import sys
from collections.abc import Iterable, Sequence
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

# Log-probabilities closer than this may change places on Metal, which adds in another order.
# Never measured on a Mac: it is the tolerance of quantized weights.
METAL_TIE = 0.25
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


def assert_repeated(expected: Sequence[GenerationEvent], actual: Sequence[GenerationEvent]) -> None:
    """Compare greedy tokens of one engine in full precision; both with `top_logprobs=2`.

    They are the same on Linux, whatever runs beside them.
    """
    assert_same_tokens(expected, actual, tie=rounding(0.0, metal=METAL_TIE))


def rounding(exact: float, *, metal: float) -> float:
    """Return the tolerance of a comparison on this system."""
    return metal if sys.platform == "darwin" else exact


class GreedyTokens(list[int]):
    """The likeliest tokens one after another; equal to what another runtime may choose.

    On Linux that is the same list.  On macOS a runtime may take the second token where the two are
    less than `METAL_TIE` apart; what follows is another text then, and is not compared.
    """

    def __init__(self, tokens: Iterable[int], seconds: Sequence[int], gaps: Sequence[float]):
        """`seconds` and `gaps` are each place's second token, and how far it is behind."""
        super().__init__(tokens)
        self._seconds, self._gaps = seconds, gaps

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list):
            return NotImplemented
        tie = rounding(0.0, metal=METAL_TIE)
        for place, (wanted, found) in enumerate(zip(self, other, strict=False)):
            if found != wanted:
                return found == self._seconds[place] and self._gaps[place] < tie
        return len(other) == len(self)

    def __ne__(self, other: object) -> bool:
        # A list has its own.
        return not self == other

    __hash__ = None

    def first(self, count: int) -> "GreedyTokens":
        """Return the first `count` tokens."""
        return GreedyTokens(self[:count], self._seconds, self._gaps)
