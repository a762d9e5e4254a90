"""Tests of the memory estimate for transformers of Hugging Face folders."""

from dataclasses import replace
from typing import Any

import pytest

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from backends.hf.memory import estimate_transformer
from core.errors import InsufficientMemory
from core.types import Capability
from core.units import MIB

WEIGHTS = 100 * MIB
# 10 layers, 4 heads of 64 for keys and for values.
ELEMENTS_PER_TOKEN = 10 * 4 * 64 * 2


def info(**details: Any) -> ModelInfo:
    return ModelInfo(
        format="safetensors",
        name="tiny",
        architecture="llama",
        quantization="bf16",
        files=(),
        size_bytes=1,
        parameters=1,
        context_length=8192,
        capabilities=frozenset({Capability.CHAT}),
        details={
            "n_layer": 10, "n_embd": 512, "n_head": 8, "n_head_kv": 4, "head_dim": 64,
            "n_ff": 1024, "vocabulary_size": 1000, "is_encoder": False, **details,
        },
    )  # fmt: skip


def estimate(
    model: ModelInfo | None = None,
    *,
    element: int = 2,
    base: int = 0,
    logits_rows: int | None = None,
    **options: Any,
) -> MemoryEstimate:
    return estimate_transformer(
        model or info(),
        EngineOptions(**options),
        weights_bytes=WEIGHTS,
        kv_element_bytes=element,
        base_bytes=base,
        logits_rows=logits_rows,
    )


def test_without_a_limit_two_contexts_are_kept() -> None:
    granted = estimate()
    assert (granted.weights_bytes, granted.context_tokens) == (WEIGHTS, 8192)
    assert granted.kv_tokens == 2 * 8192
    assert granted.kv_bytes == 2 * 8192 * ELEMENTS_PER_TOKEN * 2
    assert granted.prefix_bytes == granted.kv_bytes
    assert estimate(max_sequences=1).kv_tokens == 8192


def test_elements_and_value_widths_count() -> None:
    assert estimate(element=4).kv_bytes == 2 * estimate(element=2).kv_bytes
    narrow = estimate(info(value_head_dim=32))
    assert narrow.kv_bytes * 4 == estimate().kv_bytes * 3


def test_what_the_user_fixes_is_kept() -> None:
    granted = estimate(context_tokens=1000, kv_tokens=5000)
    assert (granted.context_tokens, granted.kv_tokens) == (1000, 5000)
    assert estimate(context_tokens=10**6).context_tokens == 8192


def test_the_context_is_lowered_to_the_limit() -> None:
    limit = WEIGHTS + 60 * MIB
    granted = estimate(memory_limit_bytes=limit)
    assert 256 <= granted.context_tokens < 8192
    assert granted.context_tokens % 256 == 0
    assert granted.context_tokens <= granted.kv_tokens
    assert granted.total_bytes <= limit
    more = estimate(memory_limit_bytes=limit + 20 * MIB)
    assert more.context_tokens > granted.context_tokens


@pytest.mark.parametrize("spare_mib", range(50, 1500, 90))
@pytest.mark.parametrize("kv_tokens", [None, 300, 100_000])
def test_the_limit_is_never_exceeded(spare_mib: int, kv_tokens: int | None) -> None:
    limit = WEIGHTS + spare_mib * MIB
    granted = estimate(memory_limit_bytes=limit, kv_tokens=kv_tokens)
    assert granted.total_bytes <= limit
    assert granted.context_tokens <= granted.kv_tokens


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    for limit in (MIB, WEIGHTS, WEIGHTS + 20 * MIB):
        with pytest.raises(InsufficientMemory, match=r"tiny.*100\.0 MiB of weights.*256 tokens"):
            estimate(memory_limit_bytes=limit)
    with pytest.raises(InsufficientMemory, match="8000 tokens"):
        estimate(memory_limit_bytes=WEIGHTS + 60 * MIB, context_tokens=8000)


def test_logits_and_the_runtimes_own_memory_count() -> None:
    plain = estimate(logits_rows=0).transient_bytes
    assert estimate(logits_rows=0, base=7).transient_bytes == plain + 7
    assert estimate(logits_rows=10).transient_bytes == plain + 10 * 1000 * 2 * 4
    assert estimate(logits_rows=16) == estimate(max_sequences=16)


def test_encoders_keep_no_cache() -> None:
    encoder = replace(info(is_encoder=True), context_length=512)
    granted = estimate(encoder)
    assert (granted.kv_bytes, granted.prefix_bytes, granted.context_tokens) == (0, 0, 512)
    assert estimate(encoder, memory_limit_bytes=granted.total_bytes).context_tokens == 512
    with pytest.raises(InsufficientMemory):
        estimate(encoder, memory_limit_bytes=WEIGHTS)
