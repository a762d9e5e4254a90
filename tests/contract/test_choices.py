"""Tests of requests with more sequences than rows, over HTTP on real engines."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from backends.base import Engine, EngineOptions
from core.types import GenerationRequest
from router.app import create_app
from router.services import EventCallback
from tests.fakes import FakeDispatcher, make_services
from tests.golden import golden
from tests.live_server import client_of, error_of, serving
from tests.models import GOLDEN, open_variant

ROWS, WAITING = 3, 12
OPTIONS = EngineOptions(
    max_sequences=ROWS, max_waiting=WAITING, threads=1, context_tokens=512, kv_tokens=2048
)
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Name a colour."}],
    "temperature": 1.0,
}


class EngineDispatcher(FakeDispatcher):
    """Runs requests on one engine, to which they come one by one."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.most_running = 0

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        self.requests.append(request)
        for _ in range(len(self.requests) % 7):
            await asyncio.sleep(0.001)
        async for event in self.engine.generate(request):
            self.most_running = max(self.most_running, self.engine.load().running)
            on_events([event])


@pytest.fixture(scope="module", params=["gguf", "mlx-4bit", "safetensors"])
def small(request: pytest.FixtureRequest) -> str:
    if request.param in GOLDEN:
        golden(GOLDEN[request.param])
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def dispatcher(small: str) -> AsyncIterator[EngineDispatcher]:
    engine = open_variant(small, OPTIONS)
    yield EngineDispatcher(engine)
    await engine.close()


async def idle(engine: Engine) -> None:
    while (load := engine.load()).running or load.waiting:
        await asyncio.sleep(0.01)


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("n", [8, ROWS + WAITING])
async def test_streamed_choices_wait_for_rows_and_keep_their_index(
    dispatcher: EngineDispatcher, n: int
) -> None:
    body = {**CHAT, "n": n, "max_tokens": 3, "stream": True, "seed": 1}
    options = {"stream_options": {"include_usage": True}}
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/chat/completions", json={**body, **options})
    assert response.status_code == 200, response.text
    chunks = chunks_of(response.text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    begun = Counter(each["index"] for each in choices if "role" in each["delta"])
    ended = Counter(each["index"] for each in choices if each["finish_reason"])
    assert begun == ended == Counter(range(n))
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] < 100
    assert n <= usage["completion_tokens"] <= 3 * n
    assert dispatcher.most_running <= ROWS


async def test_prompts_times_n_answer_in_order(dispatcher: EngineDispatcher) -> None:
    prompts = [f"The number {index} is" for index in range(4)]
    body = {"model": "tiny", "prompt": prompts, "n": 3, "echo": True, "max_tokens": 2}
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(12))
    for choice in choices:
        assert choice["text"].startswith(prompts[choice["index"] // 3])


@pytest.mark.parametrize("stream", [True, False])
async def test_more_choices_than_fit_are_refused_and_none_starts(
    dispatcher: EngineDispatcher, *, stream: bool
) -> None:
    engine = dispatcher.engine
    before = engine.load().steps
    body = {**CHAT, "n": ROWS + WAITING + 1, "max_tokens": 2, "stream": stream}
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 429
        assert error_of(response)["code"] == "queue_full"
        assert f"at most {ROWS + WAITING}" in error_of(response)["message"]
        assert int(response.headers["retry-after"]) >= 1
        # It would never fit.
        assert response.headers["x-should-retry"] == "false"
        assert engine.load().steps == before
        assert engine.load().running == engine.load().waiting == 0

        async def ask(n: int) -> httpx.Response:
            wanted = {**CHAT, "n": n, "max_tokens": 4, "stream": stream}
            return await client.post("/v1/chat/completions", json=wanted)

        both = await asyncio.gather(ask(9), ask(9))
        refused = [each for each in both if each.status_code != 200]
        assert len(refused) == 1
        assert refused[0].status_code == 429
        assert int(refused[0].headers["retry-after"]) >= 1
        assert "x-should-retry" not in refused[0].headers
        # The places of the refused ones are free again.
        assert (await ask(ROWS + WAITING)).status_code == 200


async def test_a_client_that_leaves_ends_running_and_waiting_choices(
    dispatcher: EngineDispatcher,
) -> None:
    body = {**CHAT, "n": 14, "max_tokens": 300, "stream": True, "logit_bias": {"2": -100}}
    async with serving(create_app(make_services(dispatcher))) as port:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with httpx.AsyncClient() as client, client.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    break
            assert dispatcher.engine.load().waiting > ROWS
        async with asyncio.timeout(20):
            await idle(dispatcher.engine)
