"""Core ML in a process of its own: what keeps the interpreter's lock there stops nothing here."""

import asyncio
import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from backends.base import ChildOptions, Engine, EngineOptions
from backends.coreml import process, worker
from backends.coreml.backend import CoremlBackend
from backends.coreml.layout import Layout
from backends.coreml.process import CoremlProcess
from backends.coreml.rows import CoremlRows
from backends.coreml.runtime import open_runtime
from backends.coreml.spec import ML_PROGRAM, CoremlSpec, Feature, read_spec
from backends.engine.failures import RuntimeLost
from backends.engine.row_model import RowInput
from backends.engine.trial.checks import TrialTerms
from backends.engine.trial.results import tried_rows
from backends.trials import RamTrials, TrialOptions
from core.errors import BrokenModel, EngineFailed
from core.files import passing_cause
from core.process_memory import forget_model_process, model_processes
from core.units import MIB
from scheduler.sensors.process_memory import LinuxMeter
from tests.coreml_stand_in.install import StandIn
from tests.fake_library import compile_library
from tests.requests import request, run
from tests.unit.backends.coreml.test_coreml_backend import TABLE, write_model
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[4]
BEAT_S = 0.005
HELD = {"hold_s": 1.0}
FOREVER = {"hold_s": 900}


def token_feature(name: str = "inputIds") -> Feature:
    return Feature(name, "int32", (1, 1), ((1, 1), (1, 16)))


LAYOUT = Layout(token_feature(), "logits", 16, causal="causalMask")


def write_spec(folder: Path, *, elements: int = 16) -> CoremlSpec:
    """Return the description of a language model with a state, and write its files."""
    package = folder / "tiny.mlpackage"
    package.mkdir(parents=True)
    for name in ("Manifest.json", "model.mlmodel", "weight.bin"):
        (package / name).write_bytes(name.encode())
    files = tuple(package / name for name in ("Manifest.json", "model.mlmodel", "weight.bin"))
    return CoremlSpec(
        files=files,
        model_file=files[1],
        root=package,
        version=9,
        kind=ML_PROGRAM,
        inputs={"inputIds": token_feature()},
        outputs={"logits": Feature("logits", "float32", ())},
        states={"keyCache": Feature("keyCache", "float16", (1, elements))},
    )


@pytest.fixture
def spec(tmp_path: Path) -> CoremlSpec:
    return write_spec(tmp_path / "models")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("decoder"), "LlamaForCausalLM", "logits")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("encoder"), "BertModel", "last_hidden_state")


@asynccontextmanager
async def beats() -> AsyncIterator[list[float]]:
    """Yield the times at which the event loop had a turn."""
    found: list[float] = []

    async def beat() -> None:
        while True:
            found.append(time.monotonic())
            await asyncio.sleep(BEAT_S)

    task = asyncio.ensure_future(beat())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def during(found: list[float], spans: list[tuple[float, float]]) -> list[int]:
    """Return how often the event loop had a turn in each span."""
    return [sum(start < at < end for at in found) for start, end in spans]


async def measured(stand_in: StandIn, name: str, work: Callable[[], Awaitable[Any]]) -> list[int]:
    """Return the turns of the event loop during each call `name` that `work` makes."""
    before = len(stand_in.calls(name))
    async with beats() as found:
        await work()
    return during(found, stand_in.spans(name)[before:])


async def test_the_event_loop_runs_while_core_ml_compiles_and_computes(
    stand_in: StandIn, decoder: Path
) -> None:
    backend = CoremlBackend()
    info = backend.identify(decoder)
    stand_in.set(compile=HELD)
    engines = []

    async def open_engine() -> None:
        engines.append(await asyncio.to_thread(backend.open, info, EngineOptions()))

    (turns,) = await measured(stand_in, "compile", open_engine)
    assert turns >= 5
    stand_in.set(predict=HELD)
    try:
        turns, *_ = await measured(
            stand_in, "predict", lambda: run(engines[0], request("sea", max_tokens=1))
        )
        assert turns >= 5
        assert engines[0].load().native_cpu_s > 0
    finally:
        await engines[0].close()
    # Converters are left out, which saves memory and the time of their import.
    assert {"torch", "sklearn"} <= set(stand_in.calls("import")[0]["detail"].split())


async def test_in_this_process_the_same_calls_stop_the_event_loop(stand_in: StandIn) -> None:
    path = stand_in.folder / "coremltools.py"
    source = importlib.util.spec_from_file_location("stand_in_here", path)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    stand_in.set(compile=HELD)
    async with beats() as found:
        await asyncio.to_thread(module.models.MLModel, "x")
    ((start, end),) = stand_in.spans("compile")
    times = [start, *(at for at in found if start < at < end), end]
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) >= HELD["hold_s"]


async def test_an_encoder_computes_in_its_process(stand_in: StandIn, encoder: Path) -> None:
    backend = CoremlBackend()
    stand_in.set(output="last_hidden_state")
    engine = backend.open(backend.identify(encoder), EngineOptions())
    try:
        found = await engine.embed(["grey cat town"])
    finally:
        await engine.close()
    mean = TABLE[[2, 5, 6, 7, 3]].mean(axis=0)
    np.testing.assert_allclose(found.vectors[0], mean / np.linalg.norm(mean), rtol=1e-5)


def sums(*tokens: int) -> np.ndarray[Any, Any]:
    return (sum(tokens) + len(tokens)) * np.arange(1, 9, dtype=np.float32)


def test_rows_have_states_of_their_own(stand_in: StandIn, spec: CoremlSpec) -> None:
    rows = CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 3)
    try:
        first, second = rows.open_row(8), rows.open_row(8)
        found = rows.extend([RowInput(first, [1, 2, 3]), RowInput(second, [7])])
        np.testing.assert_array_equal(found, [sums(1, 2, 3), sums(7)])
        copy = rows.copy_row(first, 2, 8)
        assert copy is not None
        assert rows.truncate(first, 1)
        found = rows.extend([RowInput(copy, [5]), RowInput(first, [6])])
        np.testing.assert_array_equal(found, [sums(1, 2, 5), sums(1, 6)])
        every = rows.extend_all(RowInput(second, [1, 1]))
        np.testing.assert_array_equal(every, [sums(7, 1), sums(7, 1, 1)])
        rows.close_row(copy)
        assert rows.native_cpu_s > 0
    finally:
        rows.close()
        rows.close()
    assert len(stand_in.calls("make_state")) == 4


def test_large_states_are_not_copied(stand_in: StandIn, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "large", elements=33 * MIB)
    rows = CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 3)
    try:
        row = rows.open_row(8)
        rows.extend([RowInput(row, [1, 2])])
        assert rows.copy_row(row, 1, 8) is None
    finally:
        rows.close()
    assert stand_in.calls("read_state") == []


def test_a_model_that_core_ml_cannot_load_says_why(stand_in: StandIn, spec: CoremlSpec) -> None:
    stand_in.set(compile={"error": "Error in declaring network."})
    with pytest.raises(BrokenModel, match=r"Core ML cannot load it \(Error in declaring network"):
        open_runtime(spec, 1)
    stand_in.set(compile={"errno": errno.ENOSPC})
    with pytest.raises(BrokenModel) as caught:
        open_runtime(spec, 1)
    # The file may be right, and is loaded again later.
    cause = passing_cause(caught.value)
    assert cause is not None
    assert cause.errno == errno.ENOSPC
    stand_in.set(predict={"error": "E5RT: no memory"})
    with pytest.raises(BrokenModel, match="E5RT: no memory"):
        CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 1)
    stand_in.set(make_state={"error": "only supported on macOS 15+"})
    with pytest.raises(BrokenModel, match="only supported on macOS 15"):
        CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 1)


@pytest.mark.parametrize("call", ["compile", "predict"])
def test_a_process_that_hangs_is_killed_at_its_limit(
    call: str, stand_in: StandIn, spec: CoremlSpec
) -> None:
    stand_in.set(**{call: FOREVER})
    limits = {"compile": (1.0, 900.0), "predict": (900.0, 1.0)}[call]
    with pytest.raises(RuntimeLost, match=r"took longer than 1 s .*; raise (load|step)_limit_s"):
        CoremlRows(open_runtime(spec, 1, ChildOptions(*limits)), spec, LAYOUT, 1)
    (begun,) = stand_in.calls(call, "begin")
    assert not is_alive(begun["pid"])


def test_a_process_that_does_not_start_is_waited_for_no_longer(
    spec: CoremlSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_START_LIMIT_S", 0.2)
    monkeypatch.setattr(process, "_COMMAND", [sys.executable, "-c", "import time; time.sleep(900)"])
    with pytest.raises(RuntimeLost, match="to start"):
        CoremlProcess(spec, ChildOptions())
    monkeypatch.setattr(process, "_START_LIMIT_S", 60)
    monkeypatch.setattr(process, "_COMMAND", [sys.executable, "-c", "import no_such_module"])
    with pytest.raises(RuntimeLost, match=r"ended with code 1 .*no_such_module"):
        CoremlProcess(spec, ChildOptions())
    monkeypatch.setattr(process, "_COMMAND", ["/no/such/python"])
    with pytest.raises(RuntimeLost, match="did not start"):
        CoremlProcess(spec, ChildOptions())


def is_alive(pid: int) -> bool:
    with_status = psutil.pid_exists(pid)
    return with_status and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_a_process_that_dies_ends_its_own_models_engine_alone(
    stand_in: StandIn, decoder: Path
) -> None:
    backend = CoremlBackend()
    info = backend.identify(decoder)
    first, second = (backend.open(info, EngineOptions()) for _ in range(2))
    try:
        stand_in.set(predict={"crash": True})
        with pytest.raises(EngineFailed, match=r"was killed by SIGKILL: probably memory was short"):
            await run(first, request("sea", max_tokens=1))
        stand_in.set()
        assert first.is_failed
        with pytest.raises(EngineFailed):
            await run(first, request("sea", max_tokens=1))
        assert not second.is_failed
        assert await run(second, request("sea", max_tokens=1))
    finally:
        await first.close()
        await second.close()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
async def test_an_engine_ends_when_its_idle_process_was_killed(
    kind: str, stand_in: StandIn, request: pytest.FixtureRequest
) -> None:
    engine = _opened(request.getfixturevalue(kind), kind, stand_in)
    try:
        (pid,) = model_processes()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineFailed):
            await _asked(engine, kind)
        assert engine.is_failed
    finally:
        await engine.close()


def _opened(package: Path, kind: str, stand_in: StandIn) -> Engine:
    stand_in.set(output="logits" if kind == "decoder" else "last_hidden_state")
    backend = CoremlBackend()
    return backend.open(backend.identify(package), EngineOptions())


async def _asked(engine: Engine, kind: str) -> Any:
    """Ask an encoder for a vector, a decoder for a token."""
    if kind == "encoder":
        return await engine.embed(["sea"])
    return await run(engine, request("sea", max_tokens=1))


def test_a_stateful_rows_open_tells_of_a_lost_process(stand_in: StandIn, spec: CoremlSpec) -> None:
    rows = CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 2)
    try:
        row = rows.open_row(4)
        (pid,) = model_processes()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeLost):
            rows.open_row(4)
        with pytest.raises(RuntimeLost):
            rows.extend([RowInput(row, [1])])
        rows.close_row(row)
    finally:
        rows.close()
    assert stand_in.calls("make_state")


def test_a_trial_whose_process_dies_says_nothing_of_the_model(
    stand_in: StandIn, spec: CoremlSpec, decoder: Path
) -> None:
    trials = RamTrials()
    info, options = CoremlBackend().identify(decoder), EngineOptions(trial=TrialOptions(trials))
    rows = CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 2)
    try:
        stand_in.set(predict={"crash": True})
        with pytest.raises(RuntimeLost):
            tried_rows(info, rows, TrialTerms(0.05), options, packages=())
    finally:
        rows.close()
    assert trials._results == {}
    stand_in.set()
    rows = CoremlRows(open_runtime(spec, 1), spec, LAYOUT, 2)
    try:
        tried_rows(info, rows, TrialTerms(0.05), options, packages=())
    finally:
        rows.close()
    (found,) = trials._results.values()
    assert found.is_sound


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
async def test_closing_kills_a_process_that_computes(
    kind: str, stand_in: StandIn, request: pytest.FixtureRequest
) -> None:
    engine = _opened(request.getfixturevalue(kind), kind, stand_in)
    begun = len(stand_in.calls("predict", "begin"))
    stand_in.set(predict=FOREVER, output="logits")
    work = asyncio.ensure_future(_asked(engine, kind))
    await wait_until(lambda: len(stand_in.calls("predict", "begin")) > begun, "it computes")
    pid = stand_in.calls("predict", "begin")[-1]["pid"]
    await engine.close()
    with pytest.raises(EngineFailed, match="was unloaded"):
        await work
    assert not is_alive(pid)
    assert not engine.is_failed


PARENT = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {root!r})
from backends.base import ChildOptions
from backends.coreml import process
process._COMMAND = {command!r}
feature = SimpleNamespace(shape=(1, 16), dtype="float16")
process.CoremlProcess(
    SimpleNamespace(package=Path("x.mlpackage"), states={{"keyCache": feature}}), ChildOptions()
)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_is_left_of_a_killed_server(number: int, stand_in: StandIn) -> None:
    stand_in.set(compile=FOREVER)
    code = PARENT.format(root=str(ROOT), command=process._COMMAND)
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        await wait_until(lambda: stand_in.calls("compile", "begin"), "it compiles", 60)
        (begun,) = stand_in.calls("compile", "begin")
        watchers = psutil.Process(begun["pid"]).children()
        assert len(watchers) == 1
        parent.send_signal(number)
        parent.wait()
        group = (begun["pid"], *(each.pid for each in watchers))
        await wait_until(lambda: not any(map(is_alive, group)), "its processes end")
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_processs_memory_counts_as_this_ones(stand_in: StandIn, spec: CoremlSpec) -> None:
    meter = LinuxMeter()
    runtime = open_runtime(spec, 1)
    try:
        (pid,) = model_processes()
        with_child = meter.read()
        forget_model_process(pid)
        without = meter.read()
        assert with_child is not None
        assert without is not None
        assert with_child - without > 10 * MIB
    finally:
        runtime.close()
    assert stand_in.calls("compile")


def test_copies_of_states_are_freed_after_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
    static long pools, wrong;
    void *objc_autoreleasePoolPush(void) { pools++; return (void *)0x7fff00000042; }
    void objc_autoreleasePoolPop(void *pool) {
        if (pool != (void *)0x7fff00000042) wrong++; else pools--;
    }
    long left(void) { return pools + 1000 * wrong; }
    """
    library = compile_library(tmp_path / "libobjc.so", source)
    monkeypatch.setattr(worker, "_OBJC", str(library))
    monkeypatch.setattr("sys.platform", "darwin")
    import ctypes

    left = ctypes.CDLL(str(library)).left
    with worker.autorelease_pool():
        assert left() == 1
    with pytest.raises(RuntimeError), worker.autorelease_pool():
        raise RuntimeError
    assert left() == 0


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML loads the model there")
def test_coremltools_itself_starts_without_converters_and_says_what_it_lacks(decoder: Path) -> None:
    spec = read_spec(decoder)
    layout = Layout(token_feature("input_ids"), "logits", 8, lengths=(8,), padding="attention_mask")
    with pytest.raises(BrokenModel, match=r"is only supported on macOS version 10\.13"):
        CoremlRows(CoremlProcess(spec, ChildOptions()), spec, layout, 1)
    assert model_processes() == ()


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML is on macOS only")
async def test_core_ml_of_this_mac_computes_and_lets_the_event_loop_run(
    decoder: Path, tmp_path: Path
) -> None:
    spec = read_spec(decoder)
    options = ChildOptions(compiled_folder=tmp_path / "compiled")
    for _ in range(2):
        async with beats() as found:
            started = time.monotonic()
            runtime = await asyncio.to_thread(open_runtime, spec, 1, options)
            ended = time.monotonic()
        try:
            assert during(found, [(started, ended)])[0] >= (ended - started) / BEAT_S / 20
            tokens = np.array([[4, 5, 0, 0, 0, 0, 0, 0]], np.int32)
            mask = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], np.int32)
            logits = runtime.compute(
                {"input_ids": tokens, "attention_mask": mask}, None, "logits", (1, 2)
            )
            np.testing.assert_allclose(logits, TABLE[[5]] @ TABLE.T, rtol=1e-2, atol=1e-2)
        finally:
            runtime.close()
    assert len(list(options.compiled_folder.glob("*.mlmodelc"))) == 1  # type: ignore[union-attr]


def test_threads_of_this_process_run_while_another_loads(
    stand_in: StandIn, spec: CoremlSpec
) -> None:
    """Two models load at the same time, each in its process."""
    stand_in.set(compile=HELD)
    opened: list[Any] = []
    threads = [
        threading.Thread(target=lambda: opened.append(open_runtime(spec, 1))) for _ in range(2)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    for each in opened:
        each.close()
    assert len({one["pid"] for one in stand_in.calls("compile")}) == len(opened) == 2
