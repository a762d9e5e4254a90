"""Quantized weights in folders: named, counted as weights, and refused where they contradict."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.hf.folder import read_folder
from backends.hf.header import TensorEntry
from backends.hf.layout import WeightLayout, weight_layout
from core.errors import BrokenModel

Entries = dict[str, TensorEntry]


def entry(dtype: str, *shape: int) -> TensorEntry:
    return TensorEntry(dtype, shape, 0)


def layout(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> WeightLayout:
    (folder / "config.json").write_text(json.dumps(config))
    return weight_layout(read_folder(folder), tensors)


def outcome(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[bool, str]:
    """Return whether there are packed weights, and the message of a refusal."""
    try:
        return bool(layout(folder, config, tensors).packed), ""
    except BrokenModel as problem:
        return False, problem.message


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
MXFP4 = {"quant_method": "mxfp4"}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def gptq() -> Entries:
    """A matrix of 48 rows and 64 columns."""
    return {
        "a.qweight": entry("I32", 8, 48),
        "a.qzeros": entry("I32", 2, 6),
        "a.scales": entry("F16", 2, 48),
        "a.g_idx": entry("I32", 64),
    }


def awq() -> Entries:
    return {
        "a.qweight": entry("I32", 64, 6),
        "a.qzeros": entry("I32", 2, 6),
        "a.scales": entry("F16", 2, 48),
    }


def fp8() -> Entries:
    return {"a.weight": entry("F8_E4M3", 48, 64), "a.weight_scale_inv": entry("F32", 2, 2)}


def bnb4() -> Entries:
    return {
        "a.weight": entry("U8", 1536, 1),
        "a.weight.absmax": entry("U8", 48),
        "a.weight.quant_map": entry("F32", 16),
        "a.weight.quant_state.bitsandbytes__fp4": entry("U8", 90),
    }


def bnb8() -> Entries:
    return {"a.weight": entry("I8", 48, 64), "a.SCB": entry("F32", 48)}


def mxfp4() -> Entries:
    return {"a_blocks": entry("U8", 3, 16, 2, 16), "a_scales": entry("U8", 3, 16, 2)}


def int4() -> Entries:
    return {
        "a.weight_packed": entry("I32", 48, 8),
        "a.weight_scale": entry("BF16", 48, 2),
        "a.weight_shape": entry("I64", 2),
    }


def nvfp4() -> Entries:
    return {
        "a.weight": entry("U8", 48, 32),
        "a.weight_scale": entry("F8_E4M3", 48, 4),
        "a.weight_scale_2": entry("F32"),
    }


ALL: Mapping[str, tuple[Mapping[str, Any], Callable[[], Entries]]] = {
    "gptq": (GPTQ, gptq),
    "awq": (AWQ, awq),
    "fp8": (FP8, fp8),
    "bnb4": (BNB4, bnb4),
    "bnb8": (BNB8, bnb8),
    "mxfp4": (MXFP4, mxfp4),
    "int4": (INT4, int4),
    "nvfp4": (NVFP4, nvfp4),
}


@pytest.mark.parametrize("name", ALL)
def test_packed_weights_count_as_weights(tmp_path: Path, name: str) -> None:
    settings, make = ALL[name]
    tensors = {**make(), "norm.weight": entry("F16", 64), "a.input_scale": entry("F32", 1)}
    found = layout(tmp_path, {"quantization_config": settings}, tensors)
    assert found.plain == ("norm.weight",)
    assert found.packed_parameters == 48 * 64
    assert found.quantization


@pytest.mark.parametrize("name", ALL)
def test_packed_weights_need_a_configuration_that_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(BrokenModel, match=r"config\.json"):
        layout(tmp_path, {}, ALL[name][1]())


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_without_packed_weights_is_refused(tmp_path: Path, name: str) -> None:
    dense = {"a.weight": entry("F16", 48, 64)}
    with pytest.raises(BrokenModel, match="no weight is stored in that form"):
        layout(tmp_path, {"quantization_config": ALL[name][0]}, dense)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("other", ALL)
def test_a_configuration_of_another_method_is_refused(
    tmp_path: Path, name: str, other: str
) -> None:
    if name == other:
        return
    with pytest.raises(BrokenModel):
        layout(tmp_path, {"quantization_config": ALL[name][0]}, ALL[other][1]())


@pytest.mark.parametrize("name", ALL)
def test_no_missing_or_misshapen_part_is_accepted_or_crashes(tmp_path: Path, name: str) -> None:
    settings, make = ALL[name]
    config = {"quantization_config": settings}
    optional = ("g_idx", "weight_scale_2")
    for part, stored in make().items():
        fewer = {key: value for key, value in make().items() if key != part}
        if not part.endswith((*optional, ".qzeros")):
            with pytest.raises(BrokenModel):
                layout(tmp_path, config, fewer)
        for shape in ((), (0,), (0, 0), (7,), (7, 5), (1, 1, 1), (2**62, 2**62)):
            bad = make() | {part: entry(stored.dtype, *shape)}
            found, message = outcome(tmp_path, config, bad)
            # The rest is in values: the shape of bnb4, and scales for a whole row or tensor.
            assert message or (found and name in ("bnb4", "fp8", "nvfp4")), (part, shape)
        with pytest.raises(BrokenModel):
            layout(tmp_path, config, make() | {part: entry("BOOL", *stored.shape)})


@pytest.mark.parametrize(
    ("settings", "make", "reason"),
    [
        (GPTQ | {"bits": 8}, gptq, "bits 8.*4 bits"),
        (GPTQ | {"bits": 5}, gptq, "bits=5"),
        (GPTQ | {"bits": None}, gptq, "bits=None|'None'"),
        (GPTQ | {"bits": True}, gptq, "True"),
        (GPTQ | {"group_size": 128}, gptq, "group size 128.*2 groups for 64 columns"),
        (GPTQ | {"group_size": -1}, gptq, "2 groups"),
        (GPTQ | {"group_size": 0}, gptq, "group_size=0"),
        (GPTQ | {"group_size": -(2**70)}, gptq, "group_size"),
        (GPTQ | {"group_size": "32"}, gptq, "not an integer"),
        (GPTQ | {"checkpoint_format": "marlin"}, gptq, "GPTQ in the layout 'marlin'"),
        (AWQ | {"bits": 8}, awq, "AWQ has 4"),
        (AWQ | {"version": "gemv"}, awq, "AWQ in the layout 'gemv'"),
        (FP8 | {"weight_block_size": [128, 128]}, fp8, "blocks of 128x128"),
        (FP8 | {"weight_block_size": [0, 1]}, fp8, "weight_block_size"),
        (FP8 | {"weight_block_size": "x"}, fp8, "weight_block_size"),
        (BNB8, bnb4, "4-bit"),
        (BNB4, bnb8, "8-bit"),
        (INT4 | {"format": "marlin-24"}, int4, "'marlin-24'"),
        (INT4 | {"config_groups": {}}, int4, "no config_groups"),
        (INT4 | {"transform_config": {"a": 1}}, int4, "rotated"),
        (INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, int4, "sparse"),
        (
            INT4 | {"config_groups": {"g": {"weights": {"num_bits": 8, "group_size": 32}}}},
            int4,
            r"shapes \[48, 8\]",
        ),
        (
            INT4 | {"config_groups": {"g": {"weights": {"num_bits": 64}}}},
            int4,
            "num_bits='64'",
        ),
        (NVFP4 | {"quant_algo": "W4A8_AWQ"}, nvfp4, "ModelOpt W4A8_AWQ"),
        ({"bits": 4, "group_size": 32}, gptq, "quant_method"),
        ([1], gptq, "not an object"),
        ("gptq", gptq, "not an object"),
        ({"quant_method": {"a": 1}}, gptq, "quant_method"),
        ({"quant_method": "nonesuch\n" * 50}, gptq, "nonesuch"),
    ],
)
def test_lies_are_refused_with_what_was_declared_and_found(
    tmp_path: Path, settings: Any, make: Callable[[], Entries], reason: str
) -> None:
    with pytest.raises(BrokenModel, match=reason):
        layout(tmp_path, {"quantization_config": settings}, make())


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("aqlm", "AQLM"), ("bitnet", "BitNet"), ("eetq", "EETQ"), ("higgs", "HIGGS"),
        ("hqq", "HQQ"), ("quanto", "Quanto"), ("quark", "AMD Quark"), ("spqr", "SpQR"),
        ("torchao", "TorchAO"), ("vptq", "VPTQ"), ("auto-round", "AutoRound"),
    ],
)  # fmt: skip
def test_methods_that_cannot_be_read_are_refused_by_name_with_what_to_do(
    tmp_path: Path, method: str, name: str
) -> None:
    with pytest.raises(BrokenModel, match=f"{name}.*unquantized weights, or a GGUF"):
        layout(tmp_path, {"quantization_config": {"quant_method": method}}, gptq())


@pytest.mark.parametrize(
    ("file", "content", "make", "quantization"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": True}, gptq, "gptq-4bit"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, awq, "awq-4bit"),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
            nvfp4,
            "nvfp4",
        ),
    ],
)
def test_settings_in_a_file_of_their_own_count_if_the_weights_are_packed(
    tmp_path: Path,
    file: str,
    content: Mapping[str, Any],
    make: Callable[[], Entries],
    quantization: str,
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert layout(tmp_path, {}, make()).quantization == quantization
    dense = {"a.weight": entry("F16", 48, 64)}
    assert layout(tmp_path, {}, dense) == WeightLayout(("a.weight",))


def test_layers_of_their_own_widths_are_read_where_the_settings_allow_it(tmp_path: Path) -> None:
    eight = {
        "b.qweight": entry("I32", 16, 48),
        "b.qzeros": entry("I32", 4, 12),
        "b.scales": entry("F16", 4, 48),
    }
    config = {"quantization_config": GPTQ}
    with pytest.raises(BrokenModel, match="b"):
        layout(tmp_path, config, gptq() | eight)
    config = {"quantization_config": GPTQ | {"dynamic": {"+:b": {"bits": 8, "group_size": 16}}}}
    found = layout(tmp_path, config, gptq() | eight)
    assert [(each.bits, each.group_size) for each in found.packed] == [(4, 32), (8, 16)]


def test_two_widths_of_one_scale_a_row_cannot_be_told_apart(tmp_path: Path) -> None:
    groups = {f"g{bits}": {"weights": {"num_bits": bits}} for bits in (4, 8)}
    tensors = int4() | {"a.weight_scale": entry("BF16", 48, 1)}
    with pytest.raises(BrokenModel, match="shapes"):
        layout(tmp_path, {"quantization_config": INT4 | {"config_groups": groups}}, tensors)


def test_integers_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    for dtype in ("U8", "I8", "I32", "U32"):
        with pytest.raises(BrokenModel, match=f"{dtype} integers"):
            layout(tmp_path, {}, {"a.weight": entry(dtype, 48, 8)})
    with pytest.raises(BrokenModel, match="8-bit integers"):
        layout(
            tmp_path,
            {"quantization_config": FP8},
            fp8() | {"b.weight": entry("I8", 4, 4), "b.weight_scale_inv": entry("F32", 1, 1)},
        )


def test_no_changed_setting_or_shape_does_more_than_refuse(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    junk: list[Any] = [None, -1, 0, 2**80, 1.5, "x" * 300, [], {}, [[]], {"a": {}}, True, "\ud800"]
    for _ in range(400):
        settings, make = ALL[str(generator.choice(list(ALL)))]
        changed = json.loads(json.dumps(settings))
        key = str(generator.choice(list(changed)))
        changed[key] = junk[generator.integers(len(junk))]
        tensors = make()
        part = str(generator.choice(list(tensors)))
        shape = [int(x) for x in generator.integers(0, 70, generator.integers(0, 5))]
        if generator.random() < 0.5:
            tensors[part] = entry(tensors[part].dtype, *shape)
        _, message = outcome(tmp_path, {"quantization_config": changed}, tensors)
        assert len(message) < 700
