"""Compares an engine's answers with those of transformers, in every way that requests arrive."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from backends.base import Engine
from core.types import GenerationEvent, JsonOutput, TextPrompt, TokenPrompt
from tests.contract.zoo.builder import ANSWER_TOKENS
from tests.contract.zoo.models import ZooModel
from tests.requests import end_of, request, run, text_of, token_ids_of

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"enum": [1, 22, 333]}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


class _Received:
    """Collects what an engine delivers."""

    def __init__(self) -> None:
        self.events: list[GenerationEvent] = []

    def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
        for _, events in batch:
            self.events.extend(events)


def _message(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]


def _difference(found: Sequence[int], wanted: Sequence[int], number: int) -> list[str]:
    """Return the first difference between two lists of tokens; nothing if they are equal."""
    if list(found) == list(wanted):
        return []
    pairs = zip(found, wanted, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), len(found))
    return [f"prompt {number + 1} differs from token {at + 1} on"]


async def _alone(engine: Engine, model: ZooModel) -> list[str]:
    """One request after the other; a second call finds the prompts' prefixes computed."""
    found = []
    for number, prompt in enumerate(model.prompts):
        events = await run(engine, request(TextPrompt(prompt), max_tokens=ANSWER_TOKENS))
        wrong = _difference(token_ids_of(events), model.answers[number], number)
        counted = end_of(events).usage.prompt_tokens
        if counted != len(model.ids[number]):
            wrong.append(f"prompt {number + 1} has {len(model.ids[number])} tokens, not {counted}")
        if not wrong and text_of(events) != model.texts[number]:
            wrong.append(f"prompt {number + 1}: the same tokens are another text")
        found += wrong
    return found


async def _streamed(engine: Engine, model: ZooModel) -> list[str]:
    received = _Received()
    wanted = request(TokenPrompt(model.ids[2]), max_tokens=ANSWER_TOKENS)
    await engine.stream_to(wanted, received)
    wrong = _difference(token_ids_of(received.events), model.answers[2], 2)
    if not wrong and text_of(received.events) != model.texts[2]:
        wrong.append("the same tokens are another text")
    if len(received.events) < 3:
        wrong.append(f"{len(received.events)} events for {ANSWER_TOKENS} tokens")
    return wrong


async def _together(engine: Engine, model: ZooModel) -> list[str]:
    """All prompts at once, and three more: rows join and leave while others run."""
    asked = [(number, ANSWER_TOKENS) for number in range(len(model.ids))]
    asked += [(3, 5), (1, 9), (0, 17)]
    answers = await asyncio.gather(
        *(
            run(engine, request(TokenPrompt(model.ids[number]), max_tokens=tokens))
            for number, tokens in asked
        )
    )
    return [
        problem
        for (number, tokens), events in zip(asked, answers, strict=True)
        for problem in _difference(token_ids_of(events), model.answers[number][:tokens], number)
    ]


async def _continued(engine: Engine, model: ZooModel) -> list[str]:
    """Each prompt with the first half of its answer: the computed prefix ends within it."""
    half = ANSWER_TOKENS // 2
    found = []
    for number, (ids, answer) in enumerate(zip(model.ids, model.answers, strict=True)):
        prompt = TokenPrompt((*ids, *answer[:half]))
        events = await run(engine, request(prompt, max_tokens=half))
        found += _difference(token_ids_of(events), answer[half:], number)
    return found


async def _with_schema(engine: Engine, model: ZooModel) -> list[str]:
    """An answer that must match a schema, beside one that is free."""
    wanted = request(TextPrompt(model.prompts[1]), max_tokens=80, output=JsonOutput(_SCHEMA))
    beside = request(TokenPrompt(model.ids[2]), max_tokens=ANSWER_TOKENS)
    constrained, free = await asyncio.gather(run(engine, wanted), run(engine, beside))
    wrong = _difference(token_ids_of(free), model.answers[2], 2)
    text = text_of(constrained)
    try:
        answer = json.loads(text)
        is_valid = answer["color"] in ("red", "blue") and answer["count"] in (1, 22, 333)
    except (ValueError, TypeError, KeyError):
        is_valid = False
    if not is_valid or len(answer) != 2:
        wrong.append(f"the answer {text[:80]!r} does not match its schema")
    return wrong


_Way: TypeAlias = Callable[[Engine, ZooModel], Awaitable[list[str]]]
ALL_WAYS: Mapping[str, _Way] = {
    "alone": _alone,
    "repeated": _alone,
    "streamed": _streamed,
    "four at once": _together,
    "a longer prompt": _continued,
    "schema": _with_schema,
}
# Where the engine that streams, constrains and remembers prefixes is checked with other weights.
FEW_WAYS: Mapping[str, _Way] = {
    "alone": _alone,
    "four at once": _together,
    "a longer prompt": _continued,
}


async def problems_of(engine: Engine, model: ZooModel, ways: Mapping[str, _Way]) -> list[str]:
    """Return what is wrong with an engine's answers, a line for each way of asking."""
    found = []
    for way, check in ways.items():
        try:
            wrong = await check(engine, model)
        except Exception as problem:
            wrong = [f"{type(problem).__name__}: {_message(problem)}"]
        if wrong:
            found.append(f"{way}: {', '.join(wrong)}")
    return found
