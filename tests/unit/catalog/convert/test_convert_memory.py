"""What conversions need is foreseen, and what they hold is read."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from catalog.convert.graph import _EDGES, plan
from catalog.convert.memory import _STEPS, needed_bytes, process_tree_bytes
from core.units import MIB
from tests.fake_library import compile_library
from tests.unit.catalog.builders import make_info

BILLION = 10**9
MODEL = replace(
    make_info("/m/model.safetensors"),
    format="safetensors",
    size_bytes=2 * BILLION,
    parameters=BILLION,
    details={"vocabulary_size": 150_000, "n_embd": 1024, "n_ff": 4096},
)

# Peaks of the processes' own memory on Linux in MiB, with the starter: 135 million parameters.
MEASURED = [
    ("gguf", "safetensors", "f32", 94, 365),
    ("gguf", "mlx", "4bit", 94, 358),
    ("gguf", "mlx", "original", 94, 340),
    ("safetensors", "mlx", "4bit", 517, 410),
    ("safetensors", "mlx", "f32", 517, 414),
    ("safetensors", "gguf", "q4_k_m", 517, 344),
]
# The same of an exporter that loads the whole model, with 170 million parameters in f32.
LOADING = [("safetensors", "coreml", "mixed", 680, 1570)]
# Exports to ONNX of models in bf16: parameters, what the model is, and the peak.
ONNX = [
    (218, {"vocabulary_size": 4_000, "n_embd": 2048, "n_layer": 3, "context": 512}, 355),
    (168, {"vocabulary_size": 150_000, "n_embd": 896, "n_layer": 4, "context": 512}, 460),
    (218, {"vocabulary_size": 32_000, "n_embd": 768, "n_layer": 22, "context": 512}, 352),
    # Angles of all rotary positions, and a traced graph of many layers.
    (1, {"vocabulary_size": 300, "n_embd": 64, "n_layer": 2, "context": 2**17}, 603),
    (1, {"vocabulary_size": 300, "n_embd": 64, "n_layer": 32, "context": 512}, 547),
]
STREAMED = [pair for pair in _STEPS if pair[1] != "coreml"]


def test_every_step_is_foreseen() -> None:
    assert {*_EDGES, ("gguf", "mlx")} == set(_STEPS)


@pytest.mark.parametrize(
    ("start", "end", "quantization", "source_mib", "peak_mib"), [*MEASURED, *LOADING]
)
def test_what_was_measured_is_foreseen(
    start: str, end: str, quantization: str, source_mib: int, peak_mib: int
) -> None:
    parameters = (170 if end == "coreml" else 135) * 10**6
    details = {"vocabulary_size": 49_152, "n_embd": 576}
    info = replace(
        MODEL, format=start, parameters=parameters, size_bytes=source_mib * MIB, details=details
    )
    needed = needed_bytes(info, plan(start, end, quantization))
    assert peak_mib * MIB * 0.9 <= needed <= peak_mib * MIB * 2


@pytest.mark.parametrize(("millions", "details", "peak_mib"), ONNX)
def test_what_exports_to_onnx_took_is_foreseen(
    millions: int, details: dict[str, int], peak_mib: int
) -> None:
    size = 2 * millions * 10**6
    info = replace(
        MODEL,
        parameters=size // 2,
        size_bytes=size,
        context_length=details["context"],
        details=details,
    )
    needed = needed_bytes(info, ("safetensors", "onnx"))
    assert peak_mib * MIB <= needed <= 1.7 * peak_mib * MIB


@pytest.mark.parametrize(("start", "end"), STREAMED)
@pytest.mark.parametrize("size_bytes", [BILLION // 2, 4 * BILLION, 40 * BILLION])
def test_no_more_is_reserved_than_twice_the_file(start: str, end: str, size_bytes: int) -> None:
    # A gigabyte of GGUF has about two billion parameters, of safetensors half a billion.
    parameters = size_bytes * 2 if start == "gguf" else size_bytes // 2
    info = replace(MODEL, format=start, size_bytes=size_bytes, parameters=parameters)
    assert needed_bytes(info, (start, end)) <= 2 * size_bytes + 600 * MIB
    chain = plan("gguf", "mlx", "4bit")
    assert needed_bytes(info, chain) <= 2 * size_bytes + 600 * MIB


def test_large_tensors_need_more() -> None:
    way = plan("safetensors", "mlx")
    wide = replace(MODEL, details={**MODEL.details, "n_embd": 4096})
    experts = replace(MODEL, details={**MODEL.details, "expert_count": 128})
    assert needed_bytes(wide, way) > needed_bytes(MODEL, way)
    assert needed_bytes(experts, way) > needed_bytes(MODEL, way)
    unknown = replace(MODEL, details={})
    assert needed_bytes(unknown, way) >= needed_bytes(MODEL, way)


def test_a_chain_needs_what_its_largest_step_needs() -> None:
    packed = replace(MODEL, format="gguf", size_bytes=BILLION // 2)
    chain = plan("gguf", "onnx")
    assert len(chain) > 2
    steps = [needed_bytes(packed, pair) for pair in itertools.pairwise(chain)]
    assert needed_bytes(packed, chain) == max(steps)


LIBPROC = """
#include <string.h>
int proc_pid_rusage(int pid, int flavor, unsigned char *info) {
    unsigned long footprint = (unsigned long)pid << 20;
    if (flavor != 2) return -1;
    memset(info, 0xee, 160);
    memcpy(info + 72, &footprint, 8);
    return 0;
}
"""


def test_macos_tells_the_memory_of_other_processes_without_privilege(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compile_library(tmp_path / "libproc.so", LIBPROC)
    monkeypatch.setattr("core.process_memory._LIBRARY", str(library))
    monkeypatch.setattr("sys.platform", "darwin")

    def denied(_: psutil.Process) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert process_tree_bytes(child.pid) == child.pid * MIB
        child.kill()


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="proc_pid_rusage is on macOS only")
def test_this_mac_tells_the_memory_of_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert process_tree_bytes(child.pid) > MIB
        child.kill()


def test_what_a_process_holds_is_its_own() -> None:
    assert process_tree_bytes(os.getpid()) > 10 * MIB
    assert process_tree_bytes(2**22 + 1) == 0
