"""What happens to requests when an engine closes."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from backends.base import Engine, EngineOptions
from backends.echo import EchoBackend, echo_info
from backends.gguf import GgufBackend
from core.errors import EngineFailed
from core.types import GenerationEvent
from tests.requests import request, run
from tests.starter import starter_path

OPTIONS = EngineOptions(max_sequences=2, threads=1, context_tokens=512, kv_tokens=1024)


def open_engine(backend: str) -> Engine:
    if backend == "echo":
        return EchoBackend().open(echo_info(), OPTIONS)
    return GgufBackend().open(GgufBackend().identify(starter_path()), OPTIONS)


async def drain(stream: AsyncGenerator[GenerationEvent, None]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("backend", ["echo", "gguf"])
async def test_close_fails_running_and_waiting_requests(backend: str) -> None:
    engine = open_engine(backend)
    streams = [engine.generate(request("x" * 400, max_tokens=400)) for _ in range(4)]
    await anext(streams[0])
    others = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineFailed, match="unload"):
        await drain(streams[0])
    results = await asyncio.gather(*others, return_exceptions=True)
    for stream in streams:
        await stream.aclose()
    assert len(results) == 3
    assert any(isinstance(result, EngineFailed) for result in results)


@pytest.mark.parametrize("backend", ["echo", "gguf"])
async def test_close_twice_is_fine_and_later_requests_fail(backend: str) -> None:
    engine = open_engine(backend)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineFailed):
        await run(engine, request("hello"))
