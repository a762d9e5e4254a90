"""What models really hold, read in this process: estimates, the way back, and KV types."""

import pytest

from backends.base import EngineOptions
from backends.gguf import GgufBackend
from core.units import MIB
from deployments.held import HeldMemory
from deployments.orders import LoadOrder
from tests.requests import request, run, text_of
from tests.starter import starter_path

OPTIONS = EngineOptions(
    max_sequences=2, threads=1, context_tokens=1024, memory_limit_bytes=350 * MIB
)


async def test_what_a_model_holds_is_measured_and_comes_back() -> None:
    backend = GgufBackend()
    info = backend.identify(starter_path())
    estimate = backend.estimate(info, OPTIONS)
    memory = HeldMemory(backend)
    engine = await memory.opening(
        LoadOrder("m", info, OPTIONS), lambda: backend.open(info, OPTIONS)
    )
    await run(engine, request("Once upon a time", max_tokens=32))
    memory.look({"m"})
    measured = memory.measured_bytes("m")
    assert info.size_bytes < measured <= 1.2 * estimate.total_bytes
    freed = await memory.closing("m", engine.close)
    assert freed.is_known
    assert freed.held_bytes > info.size_bytes
    assert freed.returned_bytes > 0.9 * freed.held_bytes
    assert freed.kept_bytes == 0


@pytest.mark.parametrize("kv_type", ["f32", "q8_0", "q5_1", "q4_0"])
async def test_every_kv_type_answers(kv_type: str) -> None:
    backend = GgufBackend()
    info = backend.identify(starter_path())
    options = EngineOptions(max_sequences=2, threads=1, context_tokens=256, kv_type=kv_type)
    engine = backend.open(info, options)
    events = await run(engine, request("The capital of France is", max_tokens=4))
    assert text_of(events)
    await engine.close()
