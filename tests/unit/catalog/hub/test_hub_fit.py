"""Whether a model fits: the verdict, its numbers, and the words that go with it."""

import re
from pathlib import Path

import pytest

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from backends.gguf.memory import estimate_gguf
from catalog.hub.fit import Fit, Room, judge, judge_listed, judge_size
from core.errors import InsufficientMemory
from core.types import Capability
from core.units import GIB

OPTIONS = EngineOptions(max_sequences=4)
INFO = ModelInfo(
    format="gguf",
    name="m",
    architecture="llama",
    quantization="q4_k_m",
    files=(Path("m.gguf"),),
    size_bytes=5 * GIB,
    parameters=8_000_000_000,
    context_length=131_072,
    capabilities=frozenset({Capability.CHAT}),
    details={
        "n_layer": 32, "n_head_kv": 8, "n_embd": 4096, "vocabulary_size": 128_256,
        "key_length": 128, "value_length": 128,
    },
)  # fmt: skip
# f16 keys and values of 32 layers with 8 heads of 128.
KV_PER_TOKEN = 32 * 8 * 256 * 2


def fit(budget: int, free: int | None = None, context: int = 8192) -> Fit:
    room = Room(budget, budget if free is None else free)
    return judge(INFO, estimate_gguf, OPTIONS, room, context)


def test_hub_fit_has_the_parts_of_the_servers_own_estimate() -> None:
    found = fit(64 * GIB)
    assert (found.verdict, found.weights_bytes) == ("fits", 5 * GIB)
    assert found.kv_bytes == 8192 * KV_PER_TOKEN
    assert 0 < found.overhead_bytes < GIB
    assert found.context_tokens == 8192
    assert found.largest_context == 131_072
    assert "free" in found.reason


def test_hub_fit_follows_the_context() -> None:
    assert fit(10 * GIB, context=8192).verdict == "fits"
    long = fit(10 * GIB, context=65_536)
    assert long.verdict == "too_big"
    assert 8192 < long.largest_context < 65_536
    assert f"the longest context that fits is {long.largest_context:,} tokens" in long.reason
    assert fit(10 * GIB, context=long.largest_context).verdict != "too_big"
    # No more than the model was trained for.
    assert fit(64 * GIB, context=10**9).context_tokens == 131_072


def test_hub_fit_is_tight_beside_other_models_or_at_the_limit() -> None:
    beside = fit(20 * GIB, free=2 * GIB)
    assert beside.verdict == "tight"
    assert "other models are unloaded" in beside.reason
    needed = beside.total_bytes
    assert fit(needed + 1).verdict == "tight"
    assert fit(needed).verdict == "tight"
    assert fit(int(needed / 0.9) + 100).verdict == "fits"
    assert fit(needed - 1).verdict == "too_big"


def test_hub_fit_of_what_fits_at_no_context_names_a_smaller_quantization() -> None:
    found = fit(3 * GIB)
    assert (found.verdict, found.largest_context) == ("too_big", 0)
    assert "choose a smaller quantization" in found.reason


@pytest.mark.parametrize("context", [256, 2048, 8192, 40_000])
@pytest.mark.parametrize("budget", [6 * GIB, 8 * GIB, 12 * GIB])
def test_hub_fit_agrees_with_what_is_granted_at_the_load(context: int, budget: int) -> None:
    """A model that fits here is one that the scheduler can plan within the same budget."""
    options = EngineOptions(max_sequences=4, context_tokens=context, memory_limit_bytes=budget)
    try:
        granted: MemoryEstimate | None = estimate_gguf(INFO, options)
    except InsufficientMemory:
        granted = None
    assert (fit(budget, context=context).verdict != "too_big") == (granted is not None)


@pytest.mark.parametrize(
    ("parameters", "weights", "formats", "verdict", "said"),
    [
        (8_000_000_000, 0, ("gguf",), "fits", r"4\.5 GiB of weights in 4\.8 bits"),
        (15_000_000_000, 0, ("gguf",), "too_big", r"8\.4 GiB of weights in 4\.8 bits"),
        (14_000_000_000, 0, ("mlx",), "tight", r"7\.8 GiB of weights in 4\.8 bits"),
        (8_000_000_000, 15 * GIB, ("safetensors",), "too_big", r"15\.0 GiB of weights\."),
        (8_000_000_000, 5 * GIB, ("safetensors",), "fits", r"5\.0 GiB of weights\."),
        (0, 5 * GIB, ("gguf", "safetensors"), "fits", r"5\.0 GiB of weights\."),
        (8_000_000_000, 0, ("onnx",), "unknown", "does not state its size"),
        (0, 0, ("gguf",), "unknown", "does not state its size"),
    ],
)
def test_hub_fit_of_a_search_result_is_an_estimate(
    parameters: int, weights: int, formats: tuple[str, ...], verdict: str, said: str
) -> None:
    found = judge_listed(parameters, weights, formats, Room(10 * GIB, 10 * GIB))
    assert found.verdict == verdict
    assert re.search(said, found.reason)


def test_hub_fit_of_weights_alone_is_never_more_than_unknown() -> None:
    room = Room(10 * GIB, 10 * GIB)
    assert judge_size(GIB, "why", room) == Fit("unknown", "why", room, weights_bytes=GIB)
    assert judge_size(0, "why", room).verdict == "unknown"
    large = judge_size(11 * GIB, "why", room)
    assert large.verdict == "too_big"
    assert "11.0 GiB" in large.reason
