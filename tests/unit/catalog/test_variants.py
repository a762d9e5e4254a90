"""Tests of the choice between variants."""

from dataclasses import replace

import pytest

from catalog.models import ModelRecord
from catalog.variants import best_variant, nearest_smaller
from tests.unit.catalog.builders import make_record

SMALL = make_record("m@gguf-q4_0", size_bytes=40)
LARGE = make_record("m@gguf-q8_0", size_bytes=80)
HUGE = make_record("m@gguf-f16", size_bytes=160)
GONE = make_record("m@gguf-q2_k", size_bytes=20, state="missing")
ALL = [SMALL, LARGE, HUGE, GONE]


@pytest.mark.parametrize(
    ("resident", "budget", "expected"),
    [
        (set(), 1000, HUGE),
        (set(), 200, LARGE),
        (set(), 160, LARGE),
        (set(), 159, SMALL),
        (set(), 10, SMALL),
        ({SMALL.id}, 1000, SMALL),
        ({SMALL.id, LARGE.id}, 1000, LARGE),
        ({GONE.id}, 200, LARGE),
    ],
)
def test_best_variant_follows_the_rule(resident: set[str], budget: int, expected: object) -> None:
    assert best_variant(ALL, resident, budget) is expected


def test_f15_a_machine_that_keeps_cool_uses_the_smallest_usable_one() -> None:
    assert best_variant(ALL, {HUGE.id}, 1000, keeps_cool=True) is SMALL
    twin = make_record("m@mlx-4bit", size_bytes=40)
    assert best_variant([SMALL, twin], {twin.id}, 1000, keeps_cool=True) is twin


def test_the_nearest_smaller_variant_is_the_largest_that_fits() -> None:
    assert nearest_smaller(HUGE, ALL, lambda one: one.info.size_bytes < 100) is LARGE
    assert nearest_smaller(LARGE, ALL, lambda _: True) is SMALL
    assert nearest_smaller(SMALL, ALL, lambda _: True) is None
    assert nearest_smaller(HUGE, ALL, lambda _: False) is None


def test_best_variant_of_unusable_ones_is_one_of_them() -> None:
    assert best_variant([GONE], set(), 100) is GONE


def test_best_variant_of_equals_is_decided_by_id() -> None:
    twin = make_record("m@gguf-q8_0-2", size_bytes=80)
    assert best_variant([twin, LARGE], set(), 1000) is LARGE


def test_best_variant_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        best_variant([], set(), 100)


def variant(format: str, size_bytes: int, **details: str) -> ModelRecord:
    """A variant of one model of a hundred weights."""
    record = make_record(f"m@{format}", size_bytes=size_bytes)
    return replace(
        record, info=replace(record.info, format=format, parameters=100, details=details)
    )


def test_best_variant_of_equally_precise_ones_is_of_the_fastest_format() -> None:
    onnx, mlx, torch = variant("onnx", 402), variant("mlx", 400), variant("pytorch", 400)
    assert best_variant([onnx, torch, mlx], set(), 1000) is mlx
    assert best_variant([torch, onnx], set(), 1000) is onnx


def test_best_variant_is_a_slow_one_only_where_there_is_no_other() -> None:
    slow, small = variant("coreml", 400, runtime="reference"), variant("gguf", 50)
    assert best_variant([slow, small], {slow.id}, 1000) is small
    assert best_variant([slow], set(), 1000) is slow


def test_weights_that_are_dequantized_count_with_what_they_take_in_memory() -> None:
    """A file of 4 bits a weight is not small if its weights are unpacked to 16."""
    packed = make_record("m@safetensors-awq-4bit", size_bytes=30)
    packed = replace(
        packed,
        info=replace(
            packed.info, format="safetensors", quantization="awq-4bit", parameters=60, details={}
        ),
    )
    assert best_variant([packed, SMALL], set(), 1000, keeps_cool=True) is SMALL
    assert best_variant([packed, SMALL], set(), 100) is SMALL
    assert nearest_smaller(LARGE, [packed, GONE], lambda _: True) is None
    stays = replace(packed, info=replace(packed.info, details={"mlx_bits": 4}))
    assert best_variant([stays, SMALL], set(), 1000, keeps_cool=True) is stays
