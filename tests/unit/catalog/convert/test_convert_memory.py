"""What conversions need is foreseen, and what they hold is read."""

import itertools
import os
from dataclasses import replace

import pytest

from catalog.convert.graph import _EDGES, plan
from catalog.convert.memory import _STEPS, needed_bytes, process_tree_bytes
from core.units import GIB, MIB
from tests.unit.catalog.builders import make_info

BILLION = 10**9
MODEL = replace(
    make_info("/m/model.safetensors"),
    format="safetensors",
    size_bytes=2 * BILLION,
    parameters=BILLION,
)

# Peaks of the processes' own memory on Linux in MiB, with 170 million parameters in f32.
MEASURED = [
    ("pytorch", "safetensors", "original", 796),
    ("safetensors", "safetensors", "bf16", 600),
    ("safetensors", "mlx", "4bit", 400),
    ("safetensors", "mlx", "f32", 826),
    ("safetensors", "gguf", "f16", 233),
    ("safetensors", "gguf", "q4_k_m", 243),
    ("safetensors", "onnx", "f32", 1290),
    ("safetensors", "onnx", "int4", 1287),
    ("safetensors", "coreml", "mixed", 1570),
]


def test_every_step_is_foreseen() -> None:
    assert {*_EDGES, ("gguf", "mlx")} == set(_STEPS)


@pytest.mark.parametrize(("start", "end", "quantization", "peak_mib"), MEASURED)
def test_what_was_measured_is_foreseen(
    start: str, end: str, quantization: str, peak_mib: int
) -> None:
    info = replace(MODEL, format=start, parameters=170 * 10**6, size_bytes=680 * 10**6)
    needed = needed_bytes(info, plan(start, end), quantization)
    assert peak_mib * MIB * 0.9 <= needed <= peak_mib * MIB * 1.5


def test_less_is_needed_for_fewer_bits() -> None:
    way = plan("safetensors", "mlx")
    four, eight, whole = (needed_bytes(MODEL, way, name) for name in ("4bit", "8bit", "f32"))
    assert four < eight < whole
    assert four < 2 * GIB


def test_a_chain_needs_what_its_largest_step_needs() -> None:
    packed = replace(MODEL, format="gguf", size_bytes=BILLION // 2)
    chain = plan("gguf", "onnx")
    assert len(chain) > 2
    steps = [needed_bytes(packed, pair, "int4") for pair in itertools.pairwise(chain)]
    assert needed_bytes(packed, chain, "int4") == max(steps)


def test_what_a_process_holds_is_its_own() -> None:
    assert process_tree_bytes(os.getpid()) > 10 * MIB
    assert process_tree_bytes(2**22 + 1) == 0
