"""What every backend's engine must do, whatever the format."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.abilities import GivesLogits, TokenCounting
from backends.base import Engine
from core.errors import ContextLengthExceeded, EngineFailed, RequestError, UnsupportedParameter
from core.types import (
    GenerationEvent,
    PrefillProgress,
    TextDelta,
    TextPrompt,
    TokenizeOptions,
    TokenLogprob,
    TokenPrompt,
    TokenRules,
    Tool,
)
from tests.requests import (
    METAL_TIE,
    assert_same_tokens,
    chat,
    end_of,
    request,
    rounding,
    run,
    text_of,
    token_ids_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = chat("Write a few sentences about the sea: grüße, 海, 🎈🎉 and so on.")


async def test_generate_streams_more_than_one_event(engine: Engine) -> None:
    events = await run(engine, request(QUESTION))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert len(deltas) > 1
    assert text_of(events)


async def test_a_greedy_answer_is_repeated_but_for_near_ties(engine: Engine) -> None:
    """Exact repetition is a model's setting: see `test_determinism.py`."""
    # Activations are rounded to int8 there, which differs more from step to step.
    tie = 0.5 if engine.info.quantization in ("q4_1", "int4") else 0.05
    first = await run(engine, request(QUESTION, top_logprobs=2))
    second = await run(engine, request(QUESTION, top_logprobs=2))
    assert_same_tokens(first, second, tie=tie)


async def test_generate_ends_at_max_tokens(engine: Engine) -> None:
    events = await run(engine, request(QUESTION, max_tokens=5))
    assert end_of(events).reason == "length"
    assert end_of(events).usage.completion_tokens == 5
    assert len(token_ids_of(events)) == 5


async def test_usage_adds_up(engine: Engine) -> None:
    prompt = TokenPrompt((72, 101, 108, 108, 111))
    events = await run(engine, request(prompt, max_tokens=8))
    usage = end_of(events).usage
    assert usage.prompt_tokens == 5
    assert usage.completion_tokens == len(token_ids_of(events))
    assert 0 <= usage.cached_tokens < usage.prompt_tokens


async def test_count_of_a_prompt_is_what_its_answer_uses(engine: Engine) -> None:
    assert isinstance(engine, TokenCounting)
    tool = Tool("weather", "Tells the weather.", {"type": "object", "properties": {}})
    for prompt in (TextPrompt("The sea is"), chat("grüße 🎈"), chat("hi", tools=(tool,))):
        events = await run(engine, request(prompt, max_tokens=1))
        assert await engine.count_tokens(prompt) == end_of(events).usage.prompt_tokens
        shown = await engine.tokenize(prompt, TokenizeOptions())
        assert len(shown.token_ids) == len(shown.pieces) == end_of(events).usage.prompt_tokens
        again = await engine.tokenize(TokenPrompt(shown.token_ids), TokenizeOptions())
        last = "The sea is" if isinstance(prompt, TextPrompt) else prompt.messages[-1].content
        assert last in shown.text
        assert last in again.text
    too_long = TokenPrompt((65,) * (engine.context_tokens * 2))
    assert await engine.count_tokens(too_long) == engine.context_tokens * 2


async def test_progress_ends_with_the_whole_prompt(engine: Engine) -> None:
    events = await run(engine, request("word " * 300, max_tokens=2))
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    done = [event.done_tokens for event in progress]
    assert done == sorted(set(done))
    assert done[-1] == progress[-1].total_tokens
    assert all(event.total_tokens == end_of(events).usage.prompt_tokens for event in progress)


async def test_stop_string_never_leaks(engine: Engine) -> None:
    whole = text_of(await run(engine, request(QUESTION, max_tokens=40)))
    for start, length in ((3, 1), (5, 4), (9, 12)):
        stop = whole[start : start + length]
        events = await run(engine, request(QUESTION, max_tokens=40, stop=[stop]))
        assert text_of(events) == whole[: whole.index(stop)]
        assert (end_of(events).reason, end_of(events).stop) == ("stop", stop)


async def test_text_is_never_cut_inside_a_character(engine: Engine) -> None:
    prompt = chat("Repeat after me: 🎈海ü🎉 🎈海ü🎉 🎈海ü🎉")
    events = await run(engine, request(prompt, max_tokens=60))
    for event in events:
        if isinstance(event, TextDelta):
            event.text.encode()
    whole = text_of(events)
    assert "\ufffd" not in whole.removesuffix("\ufffd")


async def test_sequences_run_together_as_they_run_alone(engine: Engine) -> None:
    if engine.info.quantization in ("q4_1", "int4"):
        pytest.skip("activations are rounded to int8 per batch, so near ties may fall otherwise")
    prompts = [
        request(chat(f"Say something about number {index}."), top_logprobs=2) for index in range(4)
    ]
    alone = [await run(engine, prompt) for prompt in prompts]
    together = await asyncio.gather(*(run(engine, prompt) for prompt in prompts))
    for one, other in zip(alone, together, strict=True):
        assert_same_tokens(one, other)


async def test_closing_the_generator_frees_the_sequence(engine: Engine) -> None:
    events = engine.generate(request("x" * 1500, max_tokens=500))
    await anext(events)
    await events.aclose()
    # One more request is answered after the removal was applied.
    await run(engine, request("hello", max_tokens=1))
    assert engine.load().running == 0
    assert engine.load().waiting == 0


async def test_more_requests_than_sequences_wait_and_finish(engine: Engine) -> None:
    prompts = [request(f"Number {index}:", max_tokens=4) for index in range(20)]
    answers = await asyncio.gather(*(run(engine, prompt) for prompt in prompts))
    assert all(end_of(events).usage.completion_tokens <= 4 for events in answers)
    assert engine.load().waiting == 0


async def test_logprobs_match_the_tokens(engine: Engine) -> None:
    events = await run(engine, request("The sea is", max_tokens=6, top_logprobs=3))
    entries = [
        entry for event in events if isinstance(event, TextDelta) for entry in event.logprobs
    ]
    ids = token_ids_of(events)
    assert [entry.token_id for entry in entries] == ids[: len(entries)]
    assert len(entries) >= len(ids) - 1
    for entry in entries:
        assert entry.logprob <= 0.0
        assert 1 <= len(entry.top) <= 3
        assert entry.top[0].token_id == entry.token_id
        assert [top.logprob for top in entry.top] == sorted(
            (top.logprob for top in entry.top), reverse=True
        )


async def test_prompt_logprobs_are_those_of_tokens_generated_one_by_one(engine: Engine) -> None:
    text = "The sea is deep and the sky is blue, and the"
    wanted = request(text, max_tokens=1, top_logprobs=0, prompt_logprobs=2, echo_prompt=True)
    # The second time all of the prompt is in the cache.
    first, second = [await run(engine, wanted) for _ in range(2)]
    scores = prompt_scores(first)
    assert text_of(first).startswith(text)
    assert len(scores) == end_of(first).usage.prompt_tokens > 4
    assert math.isnan(scores[0].logprob)
    # llama.cpp rounds keys and values to f16, others keep the weights' type.
    exact = 5e-3 if engine.info.format == "gguf" else 1e-3
    is_exact = engine.info.quantization in ("f32", "float32")
    tolerance = rounding(exact, metal=METAL_TIE) if is_exact else 0.25
    again = prompt_scores(second)
    for place in range(1, len(scores)):
        ids = tuple(token.token_id for token in scores[:place])
        assert again[place].logprob == pytest.approx(scores[place].logprob, abs=tolerance)
        step = await run(engine, request(TokenPrompt(ids), max_tokens=1, top_logprobs=20))
        known = {
            each.token_id: each.logprob
            for event in step
            if isinstance(event, TextDelta)
            for token in event.logprobs
            for each in token.top
        }
        # An end token has no logprobs, and the prompt's token may be an unlikely one.
        if (wanted_id := scores[place].token_id) in known:
            assert scores[place].logprob == pytest.approx(known[wanted_id], abs=tolerance)


async def test_only_the_prompt_can_be_scored(engine: Engine) -> None:
    events = await run(engine, request("The sea is", max_tokens=0, prompt_logprobs=0))
    assert len(prompt_scores(events)) == end_of(events).usage.prompt_tokens
    assert (end_of(events).usage.completion_tokens, text_of(events)) == (0, "")


async def test_the_logits_of_a_prompt_are_those_of_its_scores(engine: Engine) -> None:
    assert isinstance(engine, GivesLogits)
    wanted = request("The sea is deep and the sky is blue", max_tokens=0, prompt_logprobs=0)
    shown: dict[int, NDArray[np.float32]] = {}
    scores: list[TokenLogprob] = []

    class Receiver:
        def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
            for _, events in batch:
                for event in events:
                    scores.extend(event.logprobs if isinstance(event, PrefillProgress) else ())

    await engine.read_logits(wanted, Receiver(), lambda place, row: shown.update({place: row * 1}))
    if engine.info.format == "echo":
        assert shown == {}
        return
    assert list(shown) == list(range(len(scores) - 1))
    for place, score in enumerate(scores[1:]):
        row = shown[place].astype(np.float64)
        logprob = row[score.token_id] - row.max() - math.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(score.logprob, abs=1e-5)


def prompt_scores(events: Sequence[GenerationEvent]) -> tuple[TokenLogprob, ...]:
    found = [event.logprobs for event in events if isinstance(event, PrefillProgress)]
    return next(filter(None, found))


async def test_echo_gives_the_prompt_first(engine: Engine) -> None:
    events = await run(engine, request("The sea is", max_tokens=3, echo_prompt=True))
    assert text_of(events).startswith("The sea is")
    assert end_of(events).usage.completion_tokens == 3


async def test_prompt_over_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    # Twice the context in tokens, however many bytes a token has.
    prompt = TokenPrompt((65,) * (engine.context_tokens * 2))
    with pytest.raises(ContextLengthExceeded) as caught:
        await run(engine, request(prompt))
    assert str(engine.context_tokens) in caught.value.message
    assert str(engine.context_tokens * 2) in caught.value.message


async def test_prompt_that_just_fits_is_answered(engine: Engine) -> None:
    prompt = TokenPrompt((65,) * (engine.context_tokens - 1))
    events = await run(engine, request(prompt, max_tokens=None))
    assert end_of(events).usage.completion_tokens == 1
    assert end_of(events).reason == "length"


@pytest.mark.parametrize("token_id", [-1, 10**9])
async def test_token_ids_outside_the_vocabulary_are_refused(engine: Engine, token_id: int) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        await run(engine, request(TokenPrompt((65, token_id))))


async def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="empty"):
        await run(engine, request(TokenPrompt(())))


async def test_a_deadline_ends_the_request(engine: Engine) -> None:
    prompt = TextPrompt("x" * 1000)
    with pytest.raises(EngineFailed, match="longer than"):
        await run(engine, request(prompt, max_tokens=None, deadline_s=1e-6))
    assert text_of(await run(engine, request("The sea", max_tokens=2)))


async def test_rules_of_tokens_bound_the_answer(engine: Engine) -> None:
    # Both answers then begin with the same cached tokens: near ties fall the same way.
    await run(engine, request(QUESTION, max_tokens=1))
    plain = await run(engine, request(QUESTION, max_tokens=16))
    ids = token_ids_of(plain)
    stopped = await run(engine, request(QUESTION, rules=TokenRules(stop_token_ids=(ids[3],))))
    end = ids.index(ids[3])
    assert token_ids_of(stopped) == ids[: end + 1]
    assert end_of(stopped).reason == "stop"
    assert text_of(plain).startswith(text_of(stopped))


@pytest.mark.parametrize("rules", [TokenRules(ignore_eos=True), TokenRules(min_tokens=150)])
async def test_end_tokens_do_not_come_before_they_may(engine: Engine, rules: TokenRules) -> None:
    wanted = request(QUESTION, max_tokens=150, rules=rules)
    if engine.info.format == "echo":
        with pytest.raises(UnsupportedParameter):
            await run(engine, wanted)
        return
    events = await run(engine, wanted)
    assert end_of(events).reason == "length"
    assert end_of(events).usage.completion_tokens == len(token_ids_of(events)) == 150


async def test_bad_words_are_not_in_the_answer(engine: Engine) -> None:
    word = text_of(await run(engine, request(QUESTION))).split()[-1]
    rules = TokenRules(bad_words=(word, "é", "🎈"))
    if engine.info.format == "echo":
        with pytest.raises(UnsupportedParameter):
            await run(engine, request(QUESTION, rules=rules))
        return
    answers = await asyncio.gather(
        run(engine, request(QUESTION, rules=rules)),
        run(engine, request(QUESTION, rules=rules, temperature=1.5, seed=7)),
    )
    for events in answers:
        assert text_of(events)
        assert not any(each in text_of(events) for each in rules.bad_words)


async def test_no_cache_is_read_where_the_request_says_so(engine: Engine) -> None:
    prompt = chat("Tell me something about the sea and its waves. " * 6)
    first = await run(engine, request(prompt))
    fresh = await run(engine, replace(request(prompt), reads_cache=False))
    assert end_of(fresh).usage.cached_tokens == 0
    assert end_of(fresh).usage.prompt_tokens == end_of(first).usage.prompt_tokens
    assert text_of(fresh)
