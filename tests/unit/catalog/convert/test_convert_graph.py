"""Which conversions are offered, and why others are not."""

from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import ModelInfo
from catalog.convert import graph as convert_graph
from catalog.convert.graph import ORIGINAL, TARGETS, Conversion, check, conversions_from, plan
from core.errors import UnsupportedCapability
from core.types import Capability

DECODER = ModelInfo(
    format="safetensors",
    name="tiny",
    architecture="llama",
    quantization="bf16",
    files=(Path("/models/tiny/model.safetensors"),),
    size_bytes=10,
    parameters=5,
    context_length=64,
    capabilities=frozenset({Capability.CHAT, Capability.COMPLETION}),
)
GGUF = replace(DECODER, format="gguf", quantization="q4_1", files=(Path("/models/tiny.gguf"),))


def offered(info: ModelInfo) -> dict[str, Conversion]:
    return {conversion.target_format: conversion for conversion in conversions_from(info)}


@pytest.mark.parametrize(
    ("source", "target", "way"),
    [
        ("pytorch", "safetensors", ("pytorch", "safetensors")),
        ("pytorch", "mlx", ("pytorch", "safetensors", "mlx")),
        ("gguf", "safetensors", ("gguf", "safetensors")),
        ("gguf", "mlx", ("gguf", "safetensors", "mlx")),
        ("gguf", "onnx", ("gguf", "safetensors", "onnx")),
        ("gguf", "gguf", ("gguf", "gguf")),
        ("safetensors", "coreml", ("safetensors", "coreml")),
    ],
)
def test_plan_is_the_shortest_way(source: str, target: str, way: tuple[str, ...]) -> None:
    assert plan(source, target) == way


def test_plan_takes_blocks_to_mlx_directly() -> None:
    assert plan("gguf", "mlx", ORIGINAL) == ("gguf", "mlx")


@pytest.mark.parametrize("pair", [("onnx", "gguf"), ("mlx", "gguf"), ("gguf", "nothing")])
def test_plan_refuses_what_has_no_way(pair: tuple[str, str]) -> None:
    with pytest.raises(UnsupportedCapability, match="no conversion"):
        plan(*pair)


def test_every_format_is_offered_or_has_a_reason() -> None:
    for info in (DECODER, GGUF, replace(DECODER, format="onnx")):
        assert tuple(offered(info)) == TARGETS
    assert all(conversion.reason for conversion in conversions_from(replace(DECODER, format="mlx")))


def test_blocks_are_kept_only_where_mlx_has_the_same() -> None:
    assert offered(GGUF)["mlx"].quantizations[0] == ORIGINAL
    assert ORIGINAL not in offered(replace(GGUF, quantization="q4_k_m"))["mlx"].quantizations
    assert ORIGINAL not in offered(replace(GGUF, architecture="gemma2"))["mlx"].quantizations
    assert ORIGINAL not in offered(DECODER)["mlx"].quantizations


@pytest.mark.parametrize(
    ("info", "target", "reason"),
    [
        (replace(DECODER, quantization="int4"), "gguf", "already quantized"),
        (replace(DECODER, capabilities=frozenset({Capability.EMBEDDING})), "mlx", "generate text"),
        (replace(DECODER, architecture="mamba"), "gguf", "architecture"),
        (replace(GGUF, architecture="bert"), "safetensors", "architecture"),
        (replace(DECODER, format="coreml"), "onnx", "no conversion"),
    ],
)
def test_impossible_conversions_say_why(info: ModelInfo, target: str, reason: str) -> None:
    conversion = offered(info)[target]
    assert not conversion.is_possible
    assert reason in conversion.reason
    with pytest.raises(UnsupportedCapability, match=reason):
        check(info, target, "")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_graph, "find_spec", lambda name: None if name == "onnx" else name)
    assert "onnx" in offered(DECODER)["onnx"].reason
    assert offered(DECODER)["mlx"].is_possible


def test_embedding_models_can_become_safetensors() -> None:
    encoder = replace(DECODER, format="pytorch", capabilities=frozenset({Capability.EMBEDDING}))
    assert offered(encoder)["safetensors"].is_possible


def test_check_gives_the_default_and_refuses_unknown_quantizations() -> None:
    assert check(DECODER, "gguf", "") == "q4_k_m"
    assert check(DECODER, "gguf", "f16") == "f16"
    with pytest.raises(UnsupportedCapability, match="'9bit' is not one of") as caught:
        check(DECODER, "mlx", "9bit")
    assert caught.value.param == "quantization"
    with pytest.raises(UnsupportedCapability, match="is not a target format"):
        check(DECODER, "zip", "")
