"""Tests of the doctor's probes: each finds what is wrong, from recorded answers of macOS too."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core.units import GIB
from scheduler.thermal import Reading, ThermalState
from scripts.doctor_lib.probes import generation, libraries, mac_readings, small_llama, starter
from scripts.doctor_lib.probes.generation import Feed
from scripts.doctor_lib.row import WARN
from tests.fake_library import compile_library

Spoil = Callable[[NDArray[np.float32], int], NDArray[np.float32]]


def begin_with(spoil: Spoil) -> Callable[[], Feed]:
    """Return a runtime that computes exactly, whose logits `spoil` changes by their step."""
    weights = small_llama.make_weights()

    def begin() -> Feed:
        parts: list[NDArray[np.int64]] = []

        def feed(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
            parts.append(tokens)
            whole = np.concatenate(parts, axis=1)
            return spoil(small_llama.last_logits(weights, whole), len(parts) - 1)

        return feed

    return begin


@pytest.mark.parametrize(
    ("spoil", "most", "problem"),
    [
        (lambda logits, _: logits, 1e-3, ""),
        (lambda logits, _: logits + 0.01, 1e-3, "After the prompt the logits differ"),
        (lambda logits, _: logits * np.nan, 1e-3, "After the prompt the logits are not finite"),
        (lambda logits, step: logits + step, 1e-3, "After 3 steps with the caches the logits"),
        (lambda logits, _: logits[:, ::-1], 0.05, "After the prompt the logits differ"),
    ],
)
def test_wrong_numbers_of_a_runtime_are_found(
    monkeypatch: pytest.MonkeyPatch, spoil: Spoil, most: float, problem: str
) -> None:
    monkeypatch.setattr(generation, "_PROMPT_TOKENS", 9)
    monkeypatch.setattr(generation, "_STEPS", 3)
    found = generation.examined("device", begin_with(spoil), most)
    assert found.problem.startswith(problem)
    assert bool(found.problem) is bool(problem)
    assert found.value.startswith("device: 4 x 9 tokens ")
    assert found.value.endswith("4 of 4 tokens the same") is not bool(problem)


class RecordedMlx:
    """MLX's limits as recorded calls; `kept` is what a limit becomes."""

    def __init__(self, kept: Callable[[int], int] = int) -> None:
        self.kept = kept
        self.calls: list[tuple[str, int]] = []
        self.limit = 0

    def device_info(self) -> dict[str, int]:
        return {"max_recommended_working_set_size": 12 * GIB}

    def set_wired_limit(self, limit: int) -> int:
        self.calls.append(("wired", limit))
        former, self.limit = self.limit, self.kept(limit)
        return former

    def set_memory_limit(self, limit: int) -> int:
        self.calls.append(("memory", limit))
        return 0


def test_the_wired_limit_is_set_as_by_the_server_and_read() -> None:
    mx = RecordedMlx()
    found = generation.set_and_read(mx, 10 * GIB)
    assert found.problem == ""
    assert found.value == "10.00 GiB set, 10.00 GiB read; Metal recommends 12.00 GiB"
    assert mx.calls[0] == ("wired", 10 * GIB)
    assert generation.set_and_read(RecordedMlx(), 20 * GIB).value.startswith("12.00 GiB set")


def test_a_wired_limit_that_does_not_hold_is_found() -> None:
    found = generation.set_and_read(RecordedMlx(lambda limit: limit // 2), 10 * GIB)
    assert (found.state, "another wired limit" in found.problem) == (WARN, True)


LOG = """\
ggml_metal_library_init: using embedded metal library
ggml_metal_library_init: loaded in 7.138 sec
ggml_metal_rsets_init: creating a residency set collection (keep_alive = 180 s)
ggml_metal_device_init: GPU name:   MTL0 (Apple M4 Pro)
ggml_metal_device_init: GPU family: MTLGPUFamilyApple9  (1009)
ggml_metal_device_init: GPU family: MTLGPUFamilyCommon3 (3003)
"""
NEWER_LOG = LOG.replace(
    "ggml_metal_library_init: loaded in 7.138 sec",
    "ggml_metal_library_compile_all: loaded 34 libraries from embedded data in 9.250 sec"
    " (max single = 3.001 sec)",
)


@pytest.mark.parametrize(("log", "seconds"), [(LOG, "7.1"), (NEWER_LOG, "9.2")])
def test_the_time_to_compile_kernels_is_read_from_llama_cpps_log(log: str, seconds: str) -> None:
    told = f"; MTL0 (Apple M4 Pro), MTLGPUFamilyApple9, kernels compiled in {seconds} s"
    assert starter.metal_told(log) == told
    assert starter.metal_told("load_backend: loaded CPU backend") == ""


COOL = Reading(ThermalState.NOMINAL, ThermalState.NOMINAL)


@pytest.mark.parametrize(
    ("own", "heat", "pressure", "problem"),
    [
        (COOL, "com.apple.system.thermalpressurelevel 0", "1", ""),
        (COOL, "com.apple.system.thermalpressurelevel 2", "1", "heat serious, memory nominal."),
        (COOL, "com.apple.system.thermalpressurelevel 0", "4", "heat nominal, memory critical."),
        (COOL, "", "1", "notifyutil or sysctl tells nothing."),
        (Reading(), "com.apple.system.thermalpressurelevel 0", "1", "memory nominal."),
    ],
)
def test_heat_and_pressure_are_compared_with_the_systems_tools(
    own: Reading, heat: str, pressure: str, problem: str
) -> None:
    found = mac_readings.compared_levels(own, heat, pressure)
    assert found.problem.endswith(problem)
    assert bool(found.problem) is bool(problem)


def test_a_tool_that_is_missing_or_fails_tells_nothing() -> None:
    assert mac_readings.told("no-such-tool") == ""
    assert mac_readings.told("sh", "-c", "echo x; exit 1") == ""
    assert mac_readings.told("echo", "fine") == "fine"


def test_a_wrong_path_of_stderr_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mac_readings.path_of_errors().problem == ""
    monkeypatch.setattr("deployments.stderr_tail.stderr_path", lambda: "")
    assert mac_readings.path_of_errors().problem == "The system tells another path."


TORCH = "/x/.venv/lib/python3.12/site-packages/torch/lib/libomp.dylib"
SKLEARN = "/x/.venv/lib/python3.12/site-packages/sklearn/.dylibs/libomp.dylib"
BREW = "/opt/homebrew/opt/libomp/lib/libomp.dylib"


@pytest.mark.parametrize(
    ("on", "paths", "value", "has_problem"),
    [
        ("darwin", [TORCH, "/usr/lib/libobjc.A.dylib"], "torch/libomp.dylib", False),
        ("darwin", [TORCH, SKLEARN], "sklearn/libomp.dylib, torch/libomp.dylib", True),
        ("darwin", [BREW, TORCH], f"{BREW}, torch/libomp.dylib", True),
        ("linux", ["/a/libgomp.so.1", "/a/libgomp-1.so.1.0.0"], "", False),
        ("darwin", ["/a/libcompress.dylib"], "none", False),
    ],
)
def test_two_loaded_openmp_libraries_are_found(
    monkeypatch: pytest.MonkeyPatch, on: str, paths: list[str], value: str, has_problem: bool
) -> None:
    monkeypatch.setattr(sys, "platform", on)
    found = libraries.judged_openmp(libraries.openmp(paths))
    assert found.value == value or not value
    assert ("Error #15" in found.problem) is has_problem


def test_loaded_libraries_are_read_from_the_loader(tmp_path: Path) -> None:
    library = compile_library(
        tmp_path / "libSystem.so",
        f"""
        unsigned _dyld_image_count(void) {{ return 3; }}
        const char *_dyld_get_image_name(unsigned index) {{
            return index == 0 ? "/usr/lib/dyld" : index == 1 ? "{TORCH}" : 0;
        }}
        """,
    )
    assert libraries.images(str(library)) == ["/usr/lib/dyld", TORCH]
    ctypes.CDLL(str(library))
    if Path("/proc/self/maps").exists():
        assert str(library) in libraries.loaded()
