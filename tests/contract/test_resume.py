"""An answer begun by one engine goes on in another one as if nothing had happened."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from backends.base import Engine
from core.types import Finished, GenerationEvent, GenerationRequest, JsonOutput, PrefillProgress
from tests.models import FULL_PRECISION
from tests.requests import chat, end_of, request, run, text_of, token_ids_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = chat("Write a few words about the sea: grüße, 海, 🎈🎉 and so on.")
SCHEMA = JsonOutput(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


async def answer(engine: Engine, wanted: GenerationRequest) -> list[GenerationEvent]:
    """Return the events but for the progress."""
    return [event for event in await run(engine, wanted) if not isinstance(event, PrefillProgress)]


async def assert_continues(
    engine: Engine, wanted: GenerationRequest, places: Sequence[int] | None = None
) -> None:
    """Cut the answer after every event, or those of `places`, and let the engine go on."""
    whole = await answer(engine, wanted)
    assert len(whole) > 2
    for place in places or range(1, len(whole) - 1):
        before = whole[:place]
        rest = await answer(engine, replace(wanted, generated=tuple(token_ids_of(before))))
        joined = [*before, *rest]
        if is_same_up_to_ties(whole, joined):
            assert text_of(joined) == text_of(whole)
            assert counts(end_of(joined)) == counts(end_of(whole))


def is_same_up_to_ties(
    whole: Sequence[GenerationEvent], joined: Sequence[GenerationEvent], tie: float = 0.05
) -> bool:
    """Whether the tokens are the same; fail where they part at no near tie.

    What was computed a token at a time is computed at once then, which rounds otherwise.
    """
    entries = [entry for event in whole for entry in getattr(event, "logprobs", ())]
    for entry, token_id in zip(entries, token_ids_of(joined), strict=False):
        if token_id != entry.token_id:
            others = [top.logprob for top in entry.top if top.token_id == token_id]
            assert others == [pytest.approx(entry.logprob, abs=tie)]
            return False
    assert token_ids_of(joined) == token_ids_of(whole)
    return True


def counts(end: Finished) -> tuple[str, int, int, int]:
    usage = end.usage
    return end.reason, usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens


@pytest.mark.parametrize("variant", FULL_PRECISION, scope="session", indirect=True)
@pytest.mark.parametrize(
    "options",
    [{}, {"presence_penalty": 0.5, "frequency_penalty": 0.5}, {"repetition_penalty": 1.3}],
    ids=["plain", "presence-frequency", "repetition"],
)
async def test_a_greedy_answer_is_continued(engine: Engine, options: dict[str, Any]) -> None:
    await assert_continues(engine, request(QUESTION, top_logprobs=5, **options), (1, 7, 15))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": [" sea", "\n\n"]},
        {"presence_penalty": 0.8, "frequency_penalty": 0.8, "repetition_penalty": 1.2},
    ],
    ids=["plain", "stop", "penalties"],
)
async def test_a_greedy_answer_is_continued_after_every_event(
    gguf: Engine, options: dict[str, Any]
) -> None:
    await assert_continues(gguf, request(QUESTION, top_logprobs=5, **options))


async def test_a_constrained_answer_is_continued_after_every_event(gguf: Engine) -> None:
    wanted = request(QUESTION, max_tokens=40, output=SCHEMA, top_logprobs=5)
    await assert_continues(gguf, wanted)


async def test_logprobs_go_on(gguf: Engine) -> None:
    wanted = request("The sea is", max_tokens=8, top_logprobs=2)
    whole = await answer(gguf, wanted)
    rest = await answer(gguf, replace(wanted, generated=tuple(token_ids_of(whole)[:3])))
    expected = [entry for event in whole for entry in getattr(event, "logprobs", ())][3:]
    actual = [entry for event in rest for entry in getattr(event, "logprobs", ())]
    assert [entry.token_id for entry in actual] == [entry.token_id for entry in expected]
    assert [entry.logprob for entry in actual] == pytest.approx(
        [entry.logprob for entry in expected], abs=1e-3
    )
