"""Quantized weights become the weights that they stand for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.hf.folder import read_folder
from backends.pytorch import dequantize as module
from backends.pytorch.dequantize import dequantize
from core.errors import BrokenModel
from tests import quantized
from tests.quantized import METHODS, Quantized

torch = pytest.importorskip("torch")


def tensors(base: str, weight: Quantized) -> dict[str, Any]:
    """Return what is stored for the module `base`."""
    return {f"{base}.{ending}": value for ending, value in weight.stored.items()}


def read(folder: Path, config: Any, stored: dict[str, Any], dtype: Any = torch.float32) -> Any:
    """Dequantize `stored` beside a configuration."""
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return dequantize(read_folder(folder), stored, dtype)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chunk", [1 << 22, 512])
def test_the_weights_are_those_of_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    config, make, _ = METHODS[name]
    generator = np.random.default_rng(1)
    first, second = make(generator, (96, 64)), make(generator, (32, 96))
    stored = {"norm.weight": torch.ones(64), **tensors("a", first), **tensors("b.c", second)}
    found = read(tmp_path, config, stored)
    assert set(found) == {"norm.weight", "a.weight", "b.c.weight"}
    assert not stored
    for base, weight in (("a", first), ("b.c", second)):
        assert found[f"{base}.weight"].dtype == torch.float32
        np.testing.assert_allclose(found[f"{base}.weight"].numpy(), weight.expected, rtol=1e-6)


def test_the_type_computed_in_is_rounded_to_once(tmp_path: Path) -> None:
    weight = quantized.awq(np.random.default_rng(2), (32, 64))
    config = METHODS["awq"][0]
    found = read(tmp_path, config, tensors("a", weight), torch.bfloat16)["a.weight"]
    assert torch.equal(found, torch.from_numpy(weight.expected).to(torch.bfloat16))


def test_experts_of_gpt_oss_are_transposed(tmp_path: Path) -> None:
    weight = quantized.mxfp4_rows(np.random.default_rng(3), (3, 96, 64))
    stored = {f"e.gate_up_proj{ending}": value for ending, value in weight.stored.items()}
    found = read(tmp_path, {"quant_method": "mxfp4"}, stored)["e.gate_up_proj"]
    np.testing.assert_array_equal(found.numpy(), weight.expected.transpose(0, 2, 1))


def test_experts_in_one_tensor_have_a_grid_of_scales_each(tmp_path: Path) -> None:
    each = [quantized.float8(np.random.default_rng(n), (48, 64), block=(16, 32)) for n in range(3)]
    stored = {
        "e.up": torch.stack([one.stored["weight"] for one in each]),
        "e.up_scale_inv": torch.stack([one.stored["weight_scale_inv"] for one in each]),
    }
    config = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    found = read(tmp_path, config, stored)["e.up"]
    np.testing.assert_allclose(found.numpy(), np.stack([one.expected for one in each]), rtol=1e-6)


def test_a_zero_point_of_zero_wraps_around_in_the_first_gptq_format(tmp_path: Path) -> None:
    weight = quantized.gptq(np.random.default_rng(4), (32, 64))
    stored = tensors("a", weight)
    stored["a.qzeros"] = torch.full_like(stored["a.qzeros"], -1)
    found = read(tmp_path, METHODS["gptq"][0], stored)["a.weight"]
    assert found.min() == 0


def _group_beyond(stored: dict[str, Any]) -> None:
    stored["a.g_idx"][3] = 99


def _negative_group(stored: dict[str, Any]) -> None:
    stored["a.g_idx"][0] = -1


def _state(text: str) -> Any:
    def change(stored: dict[str, Any]) -> None:
        key = "a.weight.quant_state.bitsandbytes__nf4"
        stored[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def _short_scales(stored: dict[str, Any]) -> None:
    stored["a.weight.absmax"] = stored["a.weight.absmax"][:2]


def _small_map(stored: dict[str, Any]) -> None:
    stored["a.weight.quant_map"] = stored["a.weight.quant_map"][:3]


def _other_shape(stored: dict[str, Any]) -> None:
    stored["a.weight_shape"] = torch.tensor([1 << 40, 64])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gptq", _group_beyond, "group 99 of 4"),
        ("gptq", _negative_group, "group -1 of 4"),
        ("ct-int4", _other_shape, "weight_shape"),
        ("bnb-nf4", _state("{}"), "quant_state"),
        ("bnb-nf4", _state("[1]"), "quant_state"),
        ("bnb-nf4", _state("\xff\xfe"), "cannot be read"),
        ("bnb-nf4", _state('{"shape": [1099511627776, 64], "blocksize": 64}'), "1099511627776"),
        ("bnb-nf4", _state('{"shape": [32, 64], "blocksize": 0}'), "blocksize 0"),
        ("bnb-nf4", _state('{"shape": [32, 64], "blocksize": 2}'), "scales for 2048"),
        ("bnb-nf4", _state('{"shape": [32, 64], "blocksize": 64, "nested_offset": "x"}'), "state"),
        ("bnb-nf4", _state(" " * 5000), "over 4096"),
        ("bnb-nf4", _short_scales, "scales for 2048"),
        ("bnb-nf4", _small_map, "3 values, not 16"),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_words(
    tmp_path: Path, name: str, change: Any, reason: str
) -> None:
    config, make, _ = METHODS[name]
    stored = tensors("a", make(np.random.default_rng(5), (32, 64)))
    change(stored)
    with pytest.raises(BrokenModel, match=reason):
        read(tmp_path, config, stored)
