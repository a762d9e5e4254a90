"""What the GGUF engine does beyond the contract: sampling, grammar, KV cache, prefixes."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions
from backends.gguf.backend import GgufBackend
from core.errors import RequestError, UnsupportedCapability, UnsupportedParameter
from core.types import (
    GenerationRequest,
    JsonOutput,
    JsonValue,
    PrefillProgress,
    TextDelta,
    Tool,
    ToolCallDelta,
)
from tests.requests import (
    assert_repeated,
    assert_same_tokens,
    chat,
    end_of,
    request,
    run,
    text_of,
    token_ids_of,
)
from tests.starter import starter_path

pytestmark = pytest.mark.asyncio(loop_scope="session")

STORY = "Once upon a time there was a small harbour town by the grey sea, and in it "


async def open_starter(path: Path, **options: Any) -> Engine:
    backend = GgufBackend()
    chosen = EngineOptions(**{"threads": 1, "context_tokens": 512, **options})
    return backend.open(backend.identify(path), chosen)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowded(full_precision: Path) -> AsyncIterator[Engine]:
    """Room for one and a half contexts, shared by up to eight sequences."""
    options = {"max_sequences": 8, "context_tokens": 256, "kv_tokens": 384}
    engine = await open_starter(full_precision, **options)
    yield engine
    await engine.close()


async def test_a_banned_token_is_never_chosen(gguf: Engine) -> None:
    first = await run(gguf, request(STORY, max_tokens=1))
    (token_id,) = token_ids_of(first)
    events = await run(gguf, request(STORY, max_tokens=8, logit_bias={token_id: -100.0}))
    assert token_id not in token_ids_of(events)


async def test_a_forced_token_is_always_chosen(gguf: Engine) -> None:
    events = await run(gguf, request(STORY, max_tokens=5, logit_bias={1000: 100.0}))
    assert token_ids_of(events) == [1000] * 5


async def test_logit_bias_outside_the_vocabulary_is_refused(gguf: Engine) -> None:
    with pytest.raises(RequestError, match="49152"):
        await run(gguf, request(STORY, logit_bias={49152: 1.0}))


async def test_a_presence_penalty_changes_repeating_text(gguf: Engine) -> None:
    prompt = "a b a b a b a b a b a b a b a b"
    plain = await run(gguf, request(prompt, max_tokens=24))
    penalised = await run(gguf, request(prompt, max_tokens=24, presence_penalty=2.0))
    repeated = await run(gguf, request(prompt, max_tokens=24, repetition_penalty=1.8))
    assert len(set(token_ids_of(penalised))) > len(set(token_ids_of(plain)))
    assert text_of(repeated) != text_of(plain)


async def test_different_seeds_differ_at_high_temperature(gguf: Engine) -> None:
    def wanted(seed: int | None) -> GenerationRequest:
        return request(STORY, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)

    texts = {text_of(await run(gguf, wanted(seed))) for seed in (1, 2, 3, None, None)}
    assert len(texts) == 5


async def test_top_k_of_one_is_greedy(gguf: Engine) -> None:
    greedy = await run(gguf, request(STORY))
    sampled = await run(gguf, request(STORY, temperature=2.0, top_k=1))
    assert text_of(sampled) == text_of(greedy)


async def test_json_output_is_valid_for_its_schema(gguf: Engine) -> None:
    schema: dict[str, JsonValue] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    }
    wanted = request(chat("Describe a pet."), max_tokens=200, output=JsonOutput(schema))
    events = await run(gguf, wanted)
    answer = json.loads(text_of(events))
    assert set(answer) == {"name", "age", "kind"}
    assert answer["kind"] in ("cat", "dog")
    assert 0 <= answer["age"] <= 120
    assert end_of(events).reason == "stop"


async def test_any_json_object_is_an_object(gguf: Engine) -> None:
    wanted = request(
        chat("Answer in JSON."), max_tokens=60, output=JsonOutput(), temperature=1.5, seed=3
    )
    text = text_of(await run(gguf, wanted))
    assert text.startswith("{")


async def test_a_schema_that_cannot_be_enforced_is_refused(gguf: Engine) -> None:
    schema: dict[str, JsonValue] = {"type": "object", "unevaluatedProperties": False}
    with pytest.raises(UnsupportedParameter, match="unevaluatedProperties"):
        await run(gguf, request(chat("hi"), output=JsonOutput(schema)))


async def test_a_forced_tool_call_is_made(gguf: Engine) -> None:
    parameters: dict[str, JsonValue] = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = (Tool("weather", "Look up the weather.", parameters), Tool("time"))
    prompt = chat("What is the weather?", tools=tools, tool_choice=("function", "weather"))
    events = await run(gguf, request(prompt, max_tokens=100))
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls))["city"] in ("Oslo", "Rome")
    assert end_of(events).reason == "tool_calls"
    assert text_of(events).strip() == ""


async def test_the_second_turn_computes_only_what_is_new(gguf: Engine) -> None:
    first = await run(gguf, request(STORY * 40, max_tokens=8))
    answer = text_of(first)
    second = await run(gguf, request(STORY * 40 + answer + " And then", max_tokens=4))
    usage = end_of(second).usage
    assert usage.prompt_tokens - usage.cached_tokens <= 16
    fresh = await run(gguf, request("Quite different. " + STORY * 4, max_tokens=4))
    assert end_of(fresh).usage.cached_tokens <= 1


async def test_a_shared_prefix_gives_the_same_tokens_as_a_cold_start(full_precision: Path) -> None:
    prompt = request(STORY * 3 + "the fisherman said", max_tokens=24, top_logprobs=2)
    cold = await open_starter(full_precision, max_sequences=4, kv_tokens=2048)
    expected = await run(cold, prompt)
    await cold.close()
    warm = await open_starter(full_precision, max_sequences=4, kv_tokens=2048)
    await run(warm, request(STORY * 3 + "the baker", max_tokens=24))
    events = await run(warm, prompt)
    assert end_of(events).usage.cached_tokens > 30
    assert_repeated(expected, events)
    await warm.close()


async def test_a_prefix_outlives_its_kv_cells_in_ram(full_precision: Path) -> None:
    prompt = request(STORY * 6 + "the fisherman said", max_tokens=24, top_logprobs=2)
    others = [request(f"{index}. " + STORY * 6, max_tokens=40) for index in range(6)]
    engine = await open_starter(
        full_precision, max_sequences=2, kv_tokens=1024, prefix_bytes=10**9, warm_tokens=0
    )
    expected = await run(engine, prompt)
    for other in others:
        await run(engine, other)
    # Seven prefixes of over 200 tokens were kept; all but the last two moved out of the cells.
    assert engine.load().kv_used_tokens < 512
    again = await run(engine, prompt)
    usage = end_of(again).usage
    assert usage.cached_tokens == usage.prompt_tokens - 1
    assert_repeated(expected, again)
    await engine.close()


async def test_requests_of_one_prompt_at_once_share_its_prefill(full_precision: Path) -> None:
    engine = await open_starter(full_precision, max_sequences=4, kv_tokens=2048)
    prompts = [request(STORY * 10, max_tokens=4) for _ in range(4)]
    answers = await asyncio.gather(*(run(engine, prompt) for prompt in prompts))
    total = end_of(answers[0]).usage.prompt_tokens
    computed = [total - end_of(events).usage.cached_tokens for events in answers]
    assert sorted(computed)[:3] == [1, 1, 1]
    assert len({text_of(events) for events in answers}) == 1
    await engine.close()


async def test_a_full_kv_cache_makes_sequences_wait_and_loses_nothing(crowded: Engine) -> None:
    prompts = [
        request(f"{index}. {STORY * 2}", max_tokens=70, top_logprobs=2, logit_bias={2: -100.0})
        for index in range(6)
    ]
    alone = [await run(crowded, prompt) for prompt in prompts]
    before = crowded.load().preemptions
    together = await asyncio.gather(*(run(crowded, prompt) for prompt in prompts))
    assert crowded.load().preemptions > before
    for one, other in zip(alone, together, strict=True):
        assert_repeated(one, other)
    assert all(end_of(events).usage.completion_tokens == 70 for events in together)


async def test_a_short_request_passes_a_long_prefill(gguf: Engine) -> None:
    long = asyncio.ensure_future(run(gguf, request("7 " + "long words " * 900, max_tokens=1)))
    while not gguf.load().running:
        await asyncio.sleep(0)
    short = await run(gguf, request("Hi", max_tokens=1))
    assert not long.done()
    assert end_of(short).usage.completion_tokens == 1
    await long


async def test_cancelling_during_prefill_stops_it(gguf: Engine) -> None:
    stream = gguf.generate(request("9 " + "long words " * 900, max_tokens=1))
    await anext(stream)
    steps = gguf.load().steps
    await stream.aclose()
    await run(gguf, request("Hi", max_tokens=1))
    assert gguf.load().running == 0
    assert gguf.load().steps <= steps + 4


async def test_every_answer_keeps_its_own_text(gguf: Engine) -> None:
    words = [f"w{index}q" for index in range(8)]
    prompts = [
        request(chat(f"Repeat {word} twice."), max_tokens=12, top_logprobs=2) for word in words
    ]
    alone = [await run(gguf, prompt) for prompt in prompts]
    for _ in range(3):
        together = await asyncio.gather(*(run(gguf, prompt) for prompt in prompts))
        for one, other in zip(alone, together, strict=True):
            assert_same_tokens(one, other)


async def test_text_models_refuse_to_embed(gguf: Engine) -> None:
    with pytest.raises(UnsupportedCapability, match="embed"):
        await gguf.embed(["hello"])


async def test_the_quantized_starter_streams_plain_text() -> None:
    engine = await open_starter(starter_path(), max_sequences=2, kv_tokens=1024)
    events = await run(engine, request(chat("Say hello."), max_tokens=10))
    assert text_of(events).strip()
    assert isinstance(events[0], PrefillProgress)
    assert all(isinstance(event, TextDelta) for event in events[1:-1])
    await engine.close()
