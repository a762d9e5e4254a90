"""MLX's quantization modes and mixed recipes compute what their weights stand for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm")

from backends.hf.folder import read_folder
from backends.mlx.backend import MlxBackend
from backends.mlx.model import MlxModel, import_runtime
from tests.onnx_files import write_tokenizer
from tests.requests import rounding

CONFIG: Mapping[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128,
    "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "vocab_size": 256, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
NULLS = {"group_size": None, "bits": None}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
RECIPES: Mapping[str, dict[str, Any]] = {
    "affine": {"mode": "affine", **NULLS},
    "mxfp4": {"mode": "mxfp4", **NULLS},
    "nvfp4": {"mode": "nvfp4", **NULLS},
    "mxfp8": {"mode": "mxfp8", **NULLS},
    "no keys": {},
    "mixed": {"bits": 4, "group_size": 64, UP: {"bits": 6, "group_size": 32}, DOWN: False},
    "mixed modes": {
        "mode": "mxfp4", **NULLS,
        UP: {"mode": "affine", "bits": 8, "group_size": 32},
        DOWN: {"mode": "nvfp4", **NULLS},
    },
}  # fmt: skip
IDS = list(range(40))


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Path:
    """Write a model of MLX; return its weight file."""
    import mlx.core as mx

    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(weights), metadata={"format": "mlx"}
    )
    return folder / "model.safetensors"


def recipe(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return quantized weights, the weights they stand for, and their number."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(4)
    plain = dict(tree_flatten(Model(ModelArgs.from_dict(dict(CONFIG))).parameters()))
    packed, dense = dict(plain), dict(plain)
    for name, value in plain.items():
        base = name.removesuffix(".weight")
        own = settings.get(base, settings)
        if value.ndim < 2 or own is False:
            continue
        layout = {"mode": own.get("mode", "affine")}
        layout |= {key: own[key] for key in ("bits", "group_size") if own.get(key) is not None}
        parts = mx.quantize(value, **layout)
        packed[name] = parts[0]
        packed |= dict(zip((f"{base}.scales", f"{base}.biases"), parts[1:], strict=False))
        dense[name] = mx.dequantize(*parts, **layout).astype(mx.float32)
    return packed, dense, sum(each.size for each in plain.values())


def logits(path: Path, *, is_dense: bool) -> Any:
    import mlx.core as mx

    model = MlxModel(read_folder(path.parent), (path,), threads=1, is_dense=is_dense)
    found = np.array(model.model(mx.array([IDS])).astype(mx.float32))
    model.close()
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_computes_what_its_weights_stand_for(tmp_path: Path, name: str) -> None:
    import_runtime(1)
    settings = RECIPES[name]
    packed, dense, count = recipe(settings)
    path = write(tmp_path / "packed", {**CONFIG, "quantization": settings}, packed)
    info = MlxBackend().identify(path)
    assert info.parameters == count
    expected = logits(write(tmp_path / "dense", CONFIG, dense), is_dense=False)
    assert expected.std() > 0.01
    for is_dense in (False, True):
        near = rounding(1e-3, metal=1e-2)
        np.testing.assert_allclose(
            logits(path, is_dense=is_dense), expected, rtol=near, atol=near * expected.std()
        )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod."])
def test_wrapped_names_are_the_models_names(tmp_path: Path, prefix: str) -> None:
    import_runtime(1)
    _, dense, count = recipe({"bits": 4, "group_size": 64})
    expected = logits(write(tmp_path / "plain", CONFIG, dense), is_dense=False)
    wrapped = {prefix + name: value for name, value in dense.items()}
    averaged = {f"ema_model.{name}": value * 0 for name, value in dense.items()}
    path = write(tmp_path / "wrapped", CONFIG, wrapped | averaged)
    assert MlxBackend().identify(path).parameters == count
    np.testing.assert_array_equal(logits(path, is_dense=False), expected)
