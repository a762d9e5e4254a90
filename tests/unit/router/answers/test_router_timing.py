"""How long a request's phases took: in a header, and in the last chunk of a stream."""

from typing import Any

import pytest

from core.types import Finished, TextDelta, Timing, Usage
from router.app import create_app
from tests.fakes import CHAT_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of, sse_data

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
COMPLETION = ("/v1/completions", {"prompt": "hi"})
TIMINGS = (
    Timing(0.0001, 0.5, 0.25, load_s=2.0, evicted=("a@gguf-q8_0",)),
    Timing(0.002, 0.1234567, 1.0, throttled_s=0.5, evicted=("a@gguf-q8_0", "b"), resumed=1),
)


def played(*timings: Timing) -> FakeDispatcher:
    dispatcher = FakeDispatcher(TextDelta("x"), Finished("stop", Usage(7, 2), timings[0]))
    dispatcher.scripts = {
        str(index): (TextDelta("x"), Finished("stop", Usage(7, 2), timing))
        for index, timing in enumerate(timings)
    }
    return dispatcher


async def ask(dispatcher: FakeDispatcher, path: str, body: dict[str, Any]) -> Any:
    async with client_of(
        create_app(make_services(dispatcher)), origin="http://localhost"
    ) as client:
        response = await client.post(path, json={"model": "tiny", **body})
    assert response.status_code == 200
    return response


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
async def test_whole_answer_has_the_timing_in_a_header(path: str, body: dict[str, Any]) -> None:
    response = await ask(played(TIMINGS[1]), path, body)
    timing = response.headers["x-impetus-timing"]
    assert timing == (
        "queued;dur=2.000, load;dur=0.000, prefill;dur=123.457, decode;dur=1000.000, "
        'throttled;dur=500.000, evicted;desc="a@gguf-q8_0, b", resumed;desc="1"'
    )
    assert "x-impetus-timing" in response.headers["access-control-expose-headers"]
    assert "timing" not in response.json()


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
async def test_stream_has_the_longest_of_each_phase_beside_the_usage(
    path: str, body: dict[str, Any]
) -> None:
    options = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = await ask(played(*TIMINGS), path, {**body, **options})
    *chunks, last = sse_data(response.text)
    assert last["timing"] == {
        "queued": 2.0,
        "load": 2000.0,
        "prefill": 500.0,
        "decode": 1000.0,
        "throttled": 500.0,
        "evicted": ["a@gguf-q8_0", "b"],
        "resumed": 1,
    }
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert all("timing" not in chunk for chunk in chunks)
    assert "x-impetus-timing" not in response.headers


async def test_stream_without_usage_has_no_timing() -> None:
    path, body = CHAT
    response = await ask(played(*TIMINGS), path, {**body, "stream": True})
    assert all("timing" not in chunk for chunk in sse_data(response.text))


LLAMA_TIMINGS = {
    "cache_n": 3,
    "prompt_n": 4, "prompt_ms": 500.0, "prompt_per_token_ms": 125.0, "prompt_per_second": 8.0,
    "predicted_n": 2, "predicted_ms": 250.0, "predicted_per_token_ms": 125.0,
    "predicted_per_second": 8.0,
}  # fmt: skip
CACHED = Finished("stop", Usage(7, 2, cached_tokens=3), Timing(9.0, 0.5, 0.25, load_s=9.0))


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
async def test_timings_are_llama_cpps_where_they_are_asked_for(
    path: str, body: dict[str, Any]
) -> None:
    dispatcher = FakeDispatcher(TextDelta("x"), CACHED)
    asked = {**body, "timings_per_token": True}
    response = await ask(dispatcher, path, asked)
    assert response.json()["timings"] == LLAMA_TIMINGS
    assert "x-impetus-ignored" not in response.headers
    streamed = await ask(dispatcher, path, {**asked, "stream": True})
    *chunks, last = sse_data(streamed.text)
    assert last["timings"] == LLAMA_TIMINGS
    assert last["choices"][0]["finish_reason"] == "stop"
    assert all("timings" not in chunk for chunk in chunks)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with_usage = await ask(dispatcher, path, {**asked, **options})
    *chunks, last = sse_data(with_usage.text)
    assert (last["choices"], last["timings"]) == ([], LLAMA_TIMINGS)
    assert all("timings" not in chunk for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
@pytest.mark.parametrize("asked", [{}, {"timings_per_token": False}, {"timings_per_token": None}])
async def test_no_timings_where_nobody_asked(
    path: str, body: dict[str, Any], asked: dict[str, Any]
) -> None:
    dispatcher = FakeDispatcher(TextDelta("x"), CACHED)
    assert "timings" not in (await ask(dispatcher, path, {**body, **asked})).json()
    streamed = await ask(dispatcher, path, {**body, **asked, "stream": True})
    assert all("timings" not in chunk for chunk in sse_data(streamed.text))


async def test_timings_of_choices_count_each_prompt_once_and_come_last() -> None:
    path, body = CHAT
    asked = {**body, "n": 2, "stream": True, "timings_per_token": True}
    *chunks, last = sse_data((await ask(played(*TIMINGS), path, asked)).text)
    assert all("timings" not in chunk for chunk in chunks)
    found = last["timings"]
    assert (found["prompt_n"], found["cache_n"], found["predicted_n"]) == (7, 0, 4)
    assert (found["prompt_ms"], found["predicted_ms"]) == (500.0, 1000.0)


async def test_timings_of_nothing_are_finite() -> None:
    path, body = CHAT
    nothing = Finished("stop", Usage(7, 0, cached_tokens=7), Timing())
    response = await ask(FakeDispatcher(nothing), path, {**body, "timings_per_token": True})
    assert set(response.json()["timings"].values()) == {0, 7}


async def test_what_was_lost_is_counted() -> None:
    app = create_app(make_services(played(TIMINGS[1])))
    async with client_of(app, origin="http://localhost") as client:
        path, body = CHAT
        await client.post(path, json={"model": "tiny", **body})
        text = (await client.get("/metrics")).text
    assert f'impetus_resumptions_total{{model="{CHAT_MODEL}"}} 1.0' in text
    assert f'impetus_request_throttled_seconds_total{{model="{CHAT_MODEL}"}} 0.5' in text
