"""What happens to requests when an engine closes."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from backends.base import Engine, EngineOptions
from backends.echo import EchoBackend, echo_info
from backends.gguf.backend import GgufBackend
from core.errors import EngineFailed
from core.types import GenerationEvent
from tests.requests import request, run
from tests.starter import starter_path

OPTIONS = EngineOptions(max_sequences=2, threads=1, context_tokens=512, kv_tokens=1024)


def open_engine(backend: str) -> Engine:
    if backend == "echo":
        return EchoBackend().open(echo_info(), OPTIONS)
    return GgufBackend().open(GgufBackend().identify(starter_path()), OPTIONS)


class HeldReceiver:
    """Takes the first events and then holds the engine's thread until it is let go."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._go = threading.Event()
        self.has_events = asyncio.Event()

    def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
        del batch
        self._loop.call_soon_threadsafe(self.has_events.set)
        self._go.wait()

    def let_go(self) -> None:
        self._go.set()


@pytest.mark.parametrize("backend", ["echo", "gguf"])
async def test_close_fails_running_and_waiting_requests(backend: str) -> None:
    engine, receiver = open_engine(backend), HeldReceiver()
    work = [
        asyncio.ensure_future(engine.stream_to(request("x" * 400, max_tokens=400), receiver))
        for _ in range(4)
    ]
    await receiver.has_events.wait()
    closing = asyncio.ensure_future(engine.close())
    await asyncio.sleep(0)
    receiver.let_go()
    await closing
    for result in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(result, EngineFailed)
        assert "unload" in result.message


@pytest.mark.parametrize("backend", ["echo", "gguf"])
async def test_close_twice_is_fine_and_later_requests_fail(backend: str) -> None:
    engine = open_engine(backend)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineFailed):
        await run(engine, request("hello"))
