"""How long a request's phases took: in a header, and in the last chunk of a stream."""

from typing import Any

import pytest

from core.types import Finished, TextDelta, Timing, Usage
from router.app import create_app
from tests.fakes import FakeDispatcher, make_services
from tests.live_server import client_of, sse_data

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
COMPLETION = ("/v1/completions", {"prompt": "hi"})
TIMINGS = (Timing(0.0001, 0.5, 0.25), Timing(0.002, 0.1234567, 1.0))


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
    assert timing == "queued;dur=2.000, prefill;dur=123.457, decode;dur=1000.000"
    assert "x-impetus-timing" in response.headers["access-control-expose-headers"]
    assert "timing" not in response.json()


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
async def test_stream_has_the_longest_of_each_phase_beside_the_usage(
    path: str, body: dict[str, Any]
) -> None:
    options = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = await ask(played(*TIMINGS), path, {**body, **options})
    *chunks, last = sse_data(response.text)
    assert last["timing"] == {"queued": 2.0, "prefill": 500.0, "decode": 1000.0}
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert all("timing" not in chunk for chunk in chunks)
    assert "x-impetus-timing" not in response.headers


async def test_stream_without_usage_has_no_timing() -> None:
    path, body = CHAT
    response = await ask(played(*TIMINGS), path, {**body, "stream": True})
    assert all("timing" not in chunk for chunk in sse_data(response.text))
