"""Caches are cleared while the GPU rests, and the limits of one process are set once."""

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from backends.hf.folder import read_folder
from backends.mlx import metal
from backends.mlx.metal import GpuWork
from backends.mlx.model import MlxModel, import_runtime
from core.errors import EngineFailed
from core.units import GIB
from tests.unit.backends.mlx.test_mlx_model import finish, spec, stepper, write_tiny

PROMPT = range(1, 38)


class Recorded:
    """A GPU whose calls are recorded with the name of the thread that made them."""

    def __init__(self, **limits: float) -> None:
        self.calls: list[str] = []
        self.work = GpuWork(lambda: self.note("settle"), lambda: self.note("clear"), **limits)

    def note(self, what: str) -> None:
        self.calls.append(f"{threading.current_thread().name} {what}")


class Worker:
    """A thread that computes until it is let go."""

    def __init__(self, gpu: Recorded, name: str) -> None:
        self.began, self._go = threading.Event(), threading.Event()
        self._gpu = gpu
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        with self._gpu.work.computing():
            self._gpu.note("begins")
            self.began.set()
            assert self._go.wait(30)
            self._gpu.note("ends")

    def end(self) -> None:
        self._go.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(autouse=True)
def main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.current_thread(), "name", "main")


def test_what_is_in_flight_is_waited_for_before_caches_are_cleared() -> None:
    gpu = Recorded()
    with gpu.work.computing():
        gpu.note("ends")
    gpu.work.clear()
    assert gpu.calls == ["main ends", "main settle", "main clear"]


def test_within_a_pass_caches_are_cleared_after_it() -> None:
    gpu = Recorded()
    with gpu.work.computing():
        with gpu.work.computing():
            gpu.work.clear()
        gpu.note("ends")
    assert gpu.calls == ["main ends", "main settle", "main clear"]
    with gpu.work.computing():
        gpu.note("again")
    assert gpu.calls[3:] == ["main again"]


def test_caches_are_cleared_after_the_passes_of_other_threads() -> None:
    gpu = Recorded()
    other = Worker(gpu, "other")
    assert other.began.wait(30)
    clearing = threading.Thread(target=gpu.work.clear, name="clearing")
    clearing.start()
    while not gpu.work._is_clearing:
        pass
    late = Worker(gpu, "late")
    assert "clearing clear" not in gpu.calls
    other.end()
    clearing.join(30)
    late.end()
    cleared = gpu.calls.index("clearing clear")
    # The pass leaves nothing in flight, and no pass begins meanwhile.
    assert gpu.calls.index("other settle") < cleared < gpu.calls.index("late begins")


def test_what_another_thread_left_in_flight_has_time_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("backends.mlx.metal.time.monotonic", lambda: now[0])
    gpu = Recorded(longest_step_s=2.0)
    other = Worker(gpu, "other")
    assert other.began.wait(30)
    other.end()
    waited: list[float] = []

    def wait(limit_s: float) -> bool:
        waited.append(limit_s)
        now[0] += limit_s
        return False

    monkeypatch.setattr(gpu.work._changed, "wait", wait)
    gpu.work.clear()
    assert waited == [2.0]
    assert gpu.calls[-1] == "main clear"


def test_caches_are_kept_while_a_pass_hangs() -> None:
    gpu = Recorded(longest_step_s=0.0, clear_limit_s=0.01)
    other = Worker(gpu, "other")
    assert other.began.wait(30)
    gpu.work.clear()
    assert "main clear" not in gpu.calls
    other.end()
    gpu.work.clear()
    assert gpu.calls[-1] == "main clear"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls of MLX that change the memory of Metal, on a machine that says it has Metal."""
    import_runtime(1)
    import mlx.core as mx

    generate: Any = importlib.import_module("mlx_lm.generate")
    made: list[tuple[str, Any]] = []

    def recording(name: str) -> Any:
        return lambda *arguments: made.append((name, arguments[0] if arguments else None))

    monkeypatch.setattr(metal, "has_metal", lambda: True)
    for name in ("_work", "_limits"):
        monkeypatch.setattr(metal, name, None)
    for name in ("synchronize", "clear_cache", "set_wired_limit", "set_memory_limit"):
        monkeypatch.setattr(mx, name, recording(name))
    device = {"max_recommended_working_set_size": 12 * GIB}
    monkeypatch.setattr(mx, "device_info", lambda: device)
    # What mlx-lm does where Metal is, by its own function.
    name = "maybe_set_recommended_wired_limit"
    monkeypatch.setattr(generate, name, lambda: mx.set_wired_limit(12 * GIB) or 0)
    return made


def load(folder: Path, granted_bytes: int, budget_bytes: int | None) -> MlxModel:
    files = (folder / "model.safetensors",)
    return MlxModel(
        read_folder(folder),
        files,
        threads=1,
        is_dense=False,
        granted_bytes=granted_bytes,
        budget_bytes=budget_bytes,
    )


def test_every_clearing_of_caches_follows_a_wait(
    calls: list[tuple[str, Any]], tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "tiny")
    steps = stepper(folder)
    steps.add(spec(1, PROMPT))
    # mlx-lm clears its caches after each piece of a prompt.
    finish(steps, [spec(1, PROMPT)])
    cleared = [index for index, (name, _) in enumerate(calls) if name == "clear_cache"]
    assert len(cleared) >= 3
    steps.close()
    cleared = [index for index, (name, _) in enumerate(calls) if name == "clear_cache"]
    assert {calls[index - 1][0] for index in cleared} == {"synchronize"}


@pytest.mark.parametrize(
    ("budget_bytes", "wired"), [(8 * GIB, 8 * GIB), (64 * GIB, 12 * GIB), (None, 12 * GIB)]
)
def test_the_limits_follow_the_granted_memory_and_never_fall_while_a_model_is_open(
    budget_bytes: int | None, wired: int, calls: list[tuple[str, Any]], tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "tiny")
    for _ in range(2):
        first = load(folder, 3 * GIB, budget_bytes)
        second = load(folder, 2 * GIB, budget_bytes)
        steps = stepper(folder)
        steps.close()
        first.close()
        first.close()
        second.close()
    assert [limit for name, limit in calls if name == "set_wired_limit"] == [wired]
    limits = [limit for name, limit in calls if name == "set_memory_limit"]
    assert limits == [3 * GIB, 5 * GIB, 2 * GIB] * 2


def test_a_model_that_cannot_be_loaded_holds_no_memory(
    calls: list[tuple[str, Any]], tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "tiny")
    good = load(folder, 3 * GIB, None)
    broken = write_tiny(tmp_path / "broken", num_hidden_layers=2)
    with pytest.raises(Exception, match="cannot be loaded"):
        load(broken, 2 * GIB, None)
    good.close()
    limits = [limit for name, limit in calls if name == "set_memory_limit"]
    assert limits == [3 * GIB, 5 * GIB, 3 * GIB]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "[METAL] Command buffer execution failed: Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
            "kept the display waiting. Lower IMPETUS_PREFILL_CHUNK_TOKENS",
        ),
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
            "(00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
            "took too long",
        ),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
            "memory ran out. Unload other models",
        ),
        ("[matmul] Timeout of shapes", ""),
    ],
)
def test_errors_of_apples_driver_become_advice(text: str, advice: str, tmp_path: Path) -> None:
    steps = stepper(write_tiny(tmp_path / "tiny"))
    steps.add(spec(1, PROMPT))

    def fail(_: int) -> Any:
        raise RuntimeError(text)

    steps._batch.next = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineFailed if advice else RuntimeError, match=advice or "matmul"):
        steps.step()
    steps.close()


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs Metal")
def test_this_mac_accepts_the_limits_and_computes(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "tiny"), GIB, 2 * GIB)
    with metal.computing():
        metal.settle_and_clear()
    model.close()
    assert metal._work is not None
