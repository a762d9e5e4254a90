"""Loads of a replica: a replaced file and a caller that leaves hold up nobody."""

import asyncio
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import Engine, EngineOptions, ModelInfo
from backends.echo import EchoBackend, echo_info
from core.errors import ModelNotResident, Unavailable
from core.types import GenerationRequest, TextPrompt
from deployments.messages import LoadRequest
from deployments.replica.deployment import FormatReplica
from deployments.replica.memory import ModelMemory
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine, until


def load_request(model_id: str, path: Path | None = None) -> LoadRequest:
    files = () if path is None else (path,)
    return LoadRequest(model_id, replace(echo_info(), files=files), EngineOptions())


async def drain(replica: FormatReplica, model_id: str) -> None:
    async for _ in replica.stream(GenerationRequest("r", model_id, TextPrompt("hi"), max_tokens=2)):
        pass


@pytest.fixture
def steppers(monkeypatch: pytest.MonkeyPatch) -> list[FakeStepper]:
    """The steppers of the engines that are opened, in this order."""
    opened: list[FakeStepper] = []

    def open_(backend: EchoBackend, info: ModelInfo, options: EngineOptions) -> Engine:
        del backend, info, options
        opened.append(FakeStepper())
        return open_engine(opened[-1])

    monkeypatch.setattr(EchoBackend, "open", open_)
    return opened


async def test_a_replaced_file_holds_up_no_load_and_ends_no_stream(
    replica: FormatReplica, tmp_path: Path, steppers: list[FakeStepper]
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    await replica.load_model(load_request("a", path))
    steppers[0].gate.clear()
    old = asyncio.ensure_future(drain(replica, "a"))
    await until(steppers[0].stepping.is_set)
    (tmp_path / "new").write_bytes(b"new")
    os.replace(tmp_path / "new", path)
    # Both loads end although the old stream goes on.
    async with asyncio.timeout(30):
        await asyncio.gather(
            replica.load_model(load_request("a", path)), replica.load_model(load_request("b"))
        )
        await drain(replica, "a")
    assert not old.done()
    assert not steppers[0].is_closed
    steppers[0].gate.set()
    await old
    await until(lambda: steppers[0].is_closed)
    assert len(replica._loads) == 2
    assert [one.model_id for one in await replica.residencies()] == ["a", "b"]
    for name in ("a", "b"):
        await replica.unload_model(name)
    assert replica._loads == {}


async def test_an_unload_during_a_drain_waits_for_the_load_it_was_asked_for(
    replica: FormatReplica, tmp_path: Path, steppers: list[FakeStepper]
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    await replica.load_model(load_request("a", path))
    steppers[0].gate.clear()
    old = asyncio.ensure_future(drain(replica, "a"))
    await until(steppers[0].stepping.is_set)
    unload = asyncio.ensure_future(replica.unload_model("a"))
    await until(lambda: replica._loads["a#1"].is_draining)
    await replica.load_model(load_request("a", path))
    steppers[0].gate.set()
    await asyncio.gather(old, unload)
    assert steppers[0].is_closed
    # The later load was not what the unload meant.
    assert not steppers[1].is_closed
    assert await replica.residencies()
    await replica.unload_model("a")


async def test_a_load_whose_caller_left_is_completed(
    replica: FormatReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_open, opened = threading.Event(), EchoBackend.open

    def slowly(backend: EchoBackend, info: ModelInfo, options: EngineOptions) -> Engine:
        may_open.wait(30)
        return opened(backend, info, options)

    monkeypatch.setattr(EchoBackend, "open", slowly)
    load = asyncio.ensure_future(replica.load_model(load_request("m")))
    await until(replica._load_lock.locked)
    load.cancel()
    await asyncio.wait([load])
    may_open.set()
    await until(lambda: bool(replica._models))
    await replica.unload_model("m")


async def test_a_failed_registration_leaves_nothing_open(
    replica: FormatReplica, steppers: list[FakeStepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(engine: Engine) -> None:
        del engine
        raise Unavailable("no place")

    monkeypatch.setattr(replica._accelerator, "share", refuse)
    assert isinstance(await replica.load_model(load_request("m")), Unavailable)
    assert steppers[0].is_closed
    assert replica._loads == {}
    assert replica._memory.measured_bytes("m#1") == 0


async def test_a_model_that_is_not_here_is_denied_before_the_socket_is_tried(
    replica: FormatReplica,
) -> None:
    request = GenerationRequest("r", "m", TextPrompt("hi"))
    answer: Any = await replica.generate(request, "/nonexistent/socket")
    assert isinstance(answer, ModelNotResident)


async def test_an_unload_collects_only_what_came_with_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def close() -> None:
        """Close nothing."""

    memory, collected = ModelMemory(EchoBackend()), []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(len(gc.get_objects())))
    imported = [[number] for number in range(10_000)]
    try:
        for key in ("a", "b"):
            await memory.measure_open(load_request("m"), list, key)
        for key in ("a", "b"):
            await memory.measure_close(key, close)
    finally:
        gc.unfreeze()
    assert len(collected) == 2
    assert max(collected) < len(imported)


async def test_engines_are_not_exempt_from_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def close() -> None:
        """Close nothing."""

    events: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: events.append("freeze"))
    memory = ModelMemory(EchoBackend())
    for key in ("a", "b"):
        await memory.measure_open(load_request("m"), lambda: events.append("open"), key)
    await memory.measure_close("a", close)
    assert events == ["freeze", "open", "open"]
    await memory.measure_close("b", close)
    assert events[3:] == ["freeze"]
