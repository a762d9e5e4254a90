"""What models really hold: estimates, the way back, and KV types."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest

from backends.base import EngineOptions
from backends.gguf.backend import GgufBackend
from core.units import MIB
from deployments.messages import LoadRequest, UnloadResult
from deployments.replica.memory import ModelMemory
from tests.requests import request, run, text_of
from tests.starter import starter_path

OPTIONS = EngineOptions(
    max_sequences=2, threads=1, context_tokens=1024, memory_limit_bytes=350 * MIB
)


@dataclass(frozen=True, slots=True)
class Readings:
    """What one process read while it held the starter, and after; bytes."""

    file_bytes: int
    estimated_bytes: int
    measured_bytes: int
    freed: UnloadResult


def test_what_a_model_holds_is_measured_and_comes_back() -> None:
    # What other tests left in this process would come back along with the model.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        seen = executor.submit(_hold_the_starter).result()
    assert seen.file_bytes < seen.measured_bytes <= 1.2 * seen.estimated_bytes
    assert seen.freed.is_known
    assert seen.freed.held_bytes > seen.file_bytes
    # glibc keeps the free end of the heap of the thread that read the vocabulary, for the next one.
    assert seen.freed.returned_bytes > 0.75 * seen.freed.held_bytes
    assert seen.freed.kept_bytes == 0


def _hold_the_starter() -> Readings:
    return asyncio.run(_open_and_close())


async def _open_and_close() -> Readings:
    backend = GgufBackend()
    info = backend.identify(starter_path())
    memory = ModelMemory(backend)
    engine = await memory.measure_open(
        LoadRequest("m", info, OPTIONS), lambda: backend.open(info, OPTIONS)
    )
    await run(engine, request("Once upon a time", max_tokens=32))
    memory.sample({"m"})
    measured = memory.measured_bytes("m")
    freed = await memory.measure_close("m", engine.close)
    estimate = backend.estimate(info, OPTIONS)
    return Readings(info.size_bytes, estimate.total_bytes, measured, freed)


@pytest.mark.parametrize("kv_type", ["f32", "q8_0", "q5_1", "q4_0"])
async def test_every_kv_type_answers(kv_type: str) -> None:
    backend = GgufBackend()
    info = backend.identify(starter_path())
    options = EngineOptions(max_sequences=2, threads=1, context_tokens=256, kv_type=kv_type)
    engine = backend.open(info, options)
    events = await run(engine, request("The capital of France is", max_tokens=4))
    assert text_of(events)
    await engine.close()
