"""Tests of KV cache types: which a model supports, and their memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from backends.abilities import KV_TYPES, check_kv_type
from backends.base import EngineOptions, ModelInfo
from backends.echo import EchoBackend, echo_info
from backends.gguf.backend import GgufBackend
from core.errors import UnsupportedParameter
from core.types import Capability
from tests.gguf_files import llama_gguf


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    path: Path = llama_gguf(tmp_path_factory.mktemp("models") / "tiny-F32.gguf")
    info = GgufBackend().identify(path)
    return replace(info, details={**info.details, "key_length": 64, "value_length": 64})


def test_gguf_knows_every_type_for_whole_blocks(info: ModelInfo) -> None:
    assert set(GgufBackend().kv_types(info)) == set(KV_TYPES)
    for name in KV_TYPES:
        check_kv_type(GgufBackend(), info, name)


def test_heads_that_are_no_whole_blocks_take_floats_alone(info: ModelInfo) -> None:
    odd = replace(info, details={**info.details, "key_length": 48})
    with pytest.raises(UnsupportedParameter, match=r"q8_0; use one of f32, bf16, f16") as caught:
        check_kv_type(GgufBackend(), odd, "q8_0")
    assert caught.value.param == "kv_type"


def test_formats_without_a_choice_and_embedders_say_so(info: ModelInfo) -> None:
    embedder = replace(info, capabilities=frozenset({Capability.EMBEDDING}))
    for backend, model in ((EchoBackend(), echo_info()), (GgufBackend(), embedder)):
        with pytest.raises(UnsupportedParameter, match="leave kv_type out"):
            check_kv_type(backend, model, "f16")


def test_smaller_types_need_less_and_the_default_is_f16(info: ModelInfo) -> None:
    def kv(name: str | None) -> int:
        options = EngineOptions(context_tokens=256, kv_type=name)
        return GgufBackend().estimate(info, options).kv_bytes

    assert kv(None) == kv("f16") == kv("bf16")
    assert kv("f32") == 2 * kv("f16")
    assert kv("q8_0") == pytest.approx(kv("f16") * 34 / 64, rel=0.01)
    assert kv("q4_0") < kv("q5_1") < kv("q8_0")
