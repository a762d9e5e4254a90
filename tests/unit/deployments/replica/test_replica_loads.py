"""Loads of a replica: a replaced file and a caller that leaves hold up nobody."""

import asyncio
import errno
import gc
import os
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import Engine, EngineOptions, ModelInfo
from backends.echo import EchoBackend, echo_info
from backends.engine.trial.results import tried
from backends.trials import TrialOptions, TrialResult, tell
from catalog.changes import file_signature
from core.errors import (
    BrokenModel,
    EngineFailed,
    ModelFileChanged,
    ModelFileMissing,
    ModelNotResident,
    Unavailable,
)
from core.types import (
    EmbeddingParams,
    GenerationRequest,
    TextPrompt,
    TokenizedPrompt,
    TokenizeOptions,
)
from deployments.activity import activity_path, cause_of, read_activity
from deployments.messages import Attempt, LoadRequest, Residency
from deployments.replica.deployment import FormatReplica
from deployments.replica.memory import ModelMemory
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine, until


def load_request(model_id: str, path: Path | None = None) -> LoadRequest:
    files = () if path is None else (path,)
    return LoadRequest(model_id, replace(echo_info(), files=files), EngineOptions())


async def drain(replica: FormatReplica, model_id: str) -> None:
    request = GenerationRequest("r", model_id, TextPrompt("hi"), max_tokens=2)
    async for _ in replica.stream(request, Attempt("r", "replica")):
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
    first = await replica.load_model(load_request("a", path))
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
    # The scheduler waits for the memory of the old load, and does not mean the new one.
    assert not isinstance(first, Exception)
    freed = asyncio.ensure_future(replica.unload_model("a", first))
    await asyncio.sleep(0)
    steppers[0].gate.set()
    await old
    assert await freed is not None
    await until(lambda: len(replica._loads._loads) == 2)
    assert steppers[0].is_closed
    assert [one.model_id for one in await replica.residencies()] == ["a", "b"]
    for name in ("a", "b"):
        await replica.unload_model(name)
    assert replica._loads._loads == {}


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
    await until(lambda: replica._loads._loads["a#1"].is_draining)
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
    await until(replica._loads._lock.locked)
    load.cancel()
    await asyncio.wait([load])
    may_open.set()
    await until(lambda: bool(replica._loads._models))
    await replica.unload_model("m")


async def test_a_load_that_does_not_return_fails_the_health_check(
    replica: FormatReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_open, opened = threading.Event(), EchoBackend.open

    def hang(backend: EchoBackend, info: ModelInfo, options: EngineOptions) -> Engine:
        may_open.wait(30)
        return opened(backend, info, options)

    monkeypatch.setattr(EchoBackend, "open", hang)
    patient, hasty = load_request("a"), replace(load_request("b"), load_limit_s=0.0)
    first = asyncio.ensure_future(replica.load_model(patient))
    await until(lambda: replica._loads._work is not None)
    # The wait for another load is not part of a load's time.
    second = asyncio.ensure_future(replica.load_model(hasty))
    await asyncio.sleep(0)
    await replica.check_health()
    may_open.set()
    await first
    may_open.clear()
    await until(lambda: replica._loads._work is not None)
    with pytest.raises(EngineFailed, match="The load of b has not returned"):
        await replica.check_health()
    may_open.set()
    await second
    await replica.check_health()
    for name in ("a", "b"):
        await replica.unload_model(name)


def inspected(path: Path) -> LoadRequest:
    return replace(load_request("m", path), signatures=(file_signature(path),))


async def test_a_file_that_was_truncated_since_its_inspection_is_not_opened(
    replica: FormatReplica, tmp_path: Path, steppers: list[FakeStepper]
) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(2048))
    request = inspected(path)
    os.truncate(path, 100)
    problem: Any = await replica.load_model(request)
    assert isinstance(problem, ModelFileChanged)
    assert f"{path} changed on disk: it was truncated from 2.0 KiB (2,048" in problem.message
    assert "100 bytes" in problem.message
    assert (problem.status, problem.retry_after_s) == (503, 1)
    assert not steppers
    path.unlink()
    assert isinstance(await replica.load_model(request), ModelFileMissing)


async def test_a_file_that_changes_while_it_is_opened_is_named_as_the_cause(
    replica: FormatReplica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(2048))
    request = inspected(path)

    def fail(backend: EchoBackend, info: ModelInfo, options: EngineOptions) -> Engine:
        del backend, info, options
        os.truncate(path, 100)
        raise BrokenModel("tensor data is not within the file bounds")

    monkeypatch.setattr(EchoBackend, "open", fail)
    problem: Any = await replica.load_model(request)
    assert isinstance(problem, ModelFileChanged)
    assert "truncated from 2.0 KiB" in problem.message
    # Nothing of the failed load is left in the record of this process's work.
    assert len(replica._activity._free_models) == 128
    # A file that did not change is at fault itself.
    monkeypatch.setattr(os, "truncate", lambda *_: None)
    request = inspected(path)
    assert isinstance(await replica.load_model(request), BrokenModel)


async def test_requests_are_recorded_while_they_are_in_flight(
    replica: FormatReplica, steppers: list[FakeStepper], tmp_path: Path
) -> None:
    await replica.load_model(load_request("m"))
    steppers[0].gate.clear()
    request = GenerationRequest("r.1", "m", TextPrompt("hi"), max_tokens=2)

    async def serve() -> None:
        async for _ in replica.stream(request, Attempt("r.1", "replica", is_suspect=True)):
            pass

    work = asyncio.ensure_future(serve())
    await until(steppers[0].stepping.is_set)
    record = activity_path(tmp_path, "replica")
    assert record.parent == tmp_path / "run"
    (tmp_path / "copy").write_bytes(record.read_bytes())
    works = read_activity(tmp_path / "copy")
    assert works is not None
    assert cause_of(works).models == {"m"}
    assert cause_of(works).names("r.1")
    assert all(work.is_suspect for work in works)
    steppers[0].gate.set()
    await work
    (tmp_path / "copy").write_bytes(record.read_bytes())
    assert read_activity(tmp_path / "copy") == ()
    await replica.unload_model("m")


async def test_requests_for_another_process_are_denied(
    replica: FormatReplica, steppers: list[FakeStepper]
) -> None:
    await replica.load_model(load_request("m"))
    prompt = TextPrompt("hi")
    gone, here = Attempt("r", "died"), Attempt("r", "replica")
    assert isinstance(await replica.count_tokens("m", prompt, None, gone), ModelNotResident)
    assert isinstance(
        await replica.embed("m", ["x"], "batch", None, EmbeddingParams(), gone), ModelNotResident
    )
    assert await replica.count_tokens("m", prompt, None, here) == 2
    options = TokenizeOptions()
    assert isinstance(await replica.tokenize("m", prompt, options, None, gone), ModelNotResident)
    found = await replica.tokenize("m", prompt, options, None, here)
    assert found == TokenizedPrompt("hi", tuple(b"hi"), (b"h", b"i"))
    # Nor does an unload that is meant for another load end what was loaded since.
    (residency,) = await replica.residencies()
    for other in (replace(residency, replica_id="died"), replace(residency, load_s=-1.0)):
        assert await replica.unload_model("m", other) is None
    assert not steppers[0].is_closed
    assert await replica.unload_model("m", replace(residency, evicted=("x",))) is not None


async def test_a_failed_registration_leaves_nothing_open(
    replica: FormatReplica, steppers: list[FakeStepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(engine: Engine) -> None:
        del engine
        raise Unavailable("no place")

    monkeypatch.setattr(replica._accelerator, "share", refuse)
    assert isinstance(await replica.load_model(load_request("m")), Unavailable)
    assert steppers[0].is_closed
    assert replica._loads._loads == {}
    assert replica._loads.memory.measured_bytes("m#1") == 0


async def test_a_model_that_is_not_here_is_denied_before_the_socket_is_tried(
    replica: FormatReplica,
) -> None:
    request = GenerationRequest("r", "m", TextPrompt("hi"))
    answer: Any = await replica.generate(request, "/nonexistent/socket", Attempt("r", "replica"))
    assert isinstance(answer, ModelNotResident)


async def test_an_unload_collects_only_what_came_with_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def close() -> None:
        """Close nothing."""

    memory, collected = ModelMemory(EchoBackend()), []
    imported = [[number] for number in range(10_000)]
    for key in ("a", "b"):
        await memory.measure_open(load_request("m"), list, key)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(len(gc.get_objects())))
    for key in ("a", "b"):
        await memory.measure_close(key, close)
    assert len(collected) == 2
    assert max(collected) < len(imported)


async def test_engines_are_not_exempt_from_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def close() -> None:
        """Close nothing."""

    events: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: events.append("freeze"))
    monkeypatch.setattr(gc, "collect", lambda: events.append("collect"))
    memory = ModelMemory(EchoBackend())
    for key in ("a", "b"):
        await memory.measure_open(load_request("m"), lambda: events.append("open"), key)
    assert events == ["collect", "freeze", "open", "open"]
    for key in ("a", "b"):
        await memory.measure_close(key, close)
    assert events[4:] == ["collect", "collect"]
    # A thread may still hold an engine that was closed: frozen now, it would stay.
    await memory.measure_open(load_request("m"), lambda: events.append("open"), "c")
    assert events[6:] == ["open"]


async def test_unloaded_engines_are_collected(
    replica: FormatReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[weakref.ref[Engine]] = []
    opened = EchoBackend.open

    def open_(backend: EchoBackend, info: ModelInfo, options: EngineOptions) -> Engine:
        engine = opened(backend, info, options)
        # As real engines, it is part of a cycle.
        engine.__dict__["itself"] = engine
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(EchoBackend, "open", open_)
    for _ in range(8):
        await replica.load_model(load_request("a"))
        await replica.unload_model("a")
    # The event loop and the threads that opened them drop their last references a little later.
    until = time.monotonic() + 30
    while any(engine() for engine in engines) and time.monotonic() < until:
        await asyncio.sleep(0.01)
        gc.collect()
    assert len(engines) == 8
    assert [engine() for engine in engines] == [None] * 8


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files"), Unavailable),
        (OSError(errno.ENOSPC, "No space left on device"), Unavailable),
        (OSError(errno.EIO, "Input/output error"), Unavailable),
        (OSError(errno.EINVAL, "Invalid argument"), BrokenModel),
        (ValueError("no such tensor"), BrokenModel),
    ],
)
async def test_a_trouble_of_the_disk_is_not_the_models_fault(
    replica: FormatReplica, monkeypatch: pytest.MonkeyPatch, cause: Exception, expected: type
) -> None:
    def fails(*_: Any) -> Engine:
        try:
            raise cause
        except (OSError, ValueError) as problem:
            raise BrokenModel("The model cannot be loaded.", param="model") from problem

    opened = EchoBackend.open
    monkeypatch.setattr(EchoBackend, "open", fails)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await replica._loads.load(load_request("a"))
    assert type(caught.value) is expected
    monkeypatch.setattr(EchoBackend, "open", opened)
    await replica.load_model(load_request("a"))
    await replica.unload_model("a")


async def test_a_trial_takes_turns_and_is_kept_and_its_findings_are_told(
    replica: FormatReplica, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held: list[int] = []

    def open_(backend: EchoBackend, info: ModelInfo, options: EngineOptions) -> Engine:
        del backend, info
        assert options.trial is not None
        for _ in range(2):
            with options.trial.hold():
                held.append(len(list((tmp_path / "cache").glob("turns-*"))))

        def open_stepper() -> FakeStepper:
            stepper = FakeStepper()
            found = tried("m", "key", options.trial or TrialOptions(), wrong)
            stepper.limitations = tell("m", found)  # type: ignore[attr-defined]
            return stepper

        return open_engine(open_stepper())

    def wrong() -> TrialResult:
        made.append(1)
        return TrialResult(has_batches=False, reason="they differ")

    made: list[int] = []
    monkeypatch.setattr(EchoBackend, "open", open_)
    for name in ("a", "b"):
        residency = await replica.load_model(load_request(name))
        assert isinstance(residency, Residency)
        assert residency.limitations == tell("m", wrong())
    assert held == [1] * 4
    # Once for both loads, and once for each comparison above.
    assert len(made) == 3
    assert len(list((tmp_path / "cache" / "trials").iterdir())) == 1
    await replica._accelerator.close()
