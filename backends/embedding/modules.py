"""The modules after the pooling of a sentence-transformers model: Dense, LayerNorm, Normalize.

Source of their formulas and files: sentence-transformers 6.2, `Dense`, `LayerNorm`, `Normalize`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.embedding.pooling import unit
from backends.small_json import read_object
from core.errors import BrokenModel
from core.units import format_bytes

Vectors: TypeAlias = NDArray[np.float32]
Step: TypeAlias = Callable[[Vectors], Vectors]
# Reads all tensors of one file; raises BrokenModel.
TensorReader: TypeAlias = Callable[[Path], Mapping[str, NDArray[Any]]]

_MAX_WIDTH = 65_536
_MAX_WEIGHT_BYTES = 1 << 30
_LAYER_NORM_EPSILON = 1e-5
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_POOLED = "sentence_embedding"


def _gelu(values: Vectors) -> Vectors:
    error_function = np.vectorize(math.erf, otypes=[np.float64])
    return np.asarray(values * 0.5 * (1 + error_function(values / math.sqrt(2))), np.float32)


def _sigmoid(values: Vectors) -> Vectors:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * values.astype(np.float64))), np.float32)


_ACTIVATIONS: Mapping[str, Step] = {
    "Identity": lambda values: values,
    "Tanh": lambda values: np.tanh(values),
    "ReLU": lambda values: np.maximum(values, 0),
    "GELU": _gelu,
    "Sigmoid": _sigmoid,
    "SiLU": lambda values: values * _sigmoid(values),
    "LeakyReLU": lambda values: np.where(values < 0, np.float32(0.01) * values, values),
}


@dataclass(frozen=True, slots=True)
class ModuleConfig:
    """One module, as its config.json describes it; no weights are read.

    `width` is the length of the vectors it takes, `out_width` of those it gives, 0 if it does not
    say.  `path` is its folder.
    """

    kind: str
    path: Path
    width: int = 0
    out_width: int = 0
    has_bias: bool = True
    activation: str = "Identity"
    has_residual: bool = False


def activation(name: object, default: str) -> str:
    """Return the class name of an activation's dotted path, or `default` for None.

    Raises BrokenModel for one that is not supported.
    """
    if name is None:
        return default
    kind = name.rsplit(".", 1)[-1] if isinstance(name, str) and name.startswith("torch.") else ""
    if kind not in _ACTIVATIONS:
        raise BrokenModel(
            f"The activation function {str(name)[:80]!r} is not supported; supported are "
            f"{', '.join(_ACTIVATIONS)} of torch.nn.",
            param="model",
        )
    return kind


def activate(kind: str, values: Vectors) -> Vectors:
    """Apply the activation function of this name, one that `activation` returned."""
    return np.asarray(_ACTIVATIONS[kind](values), np.float32)


def read_module(kind: str, path: Path) -> ModuleConfig:
    """Read the config.json of a Dense, LayerNorm or Normalize module.  Raises BrokenModel."""
    config = read_object(path / "config.json")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, _POOLED):
            raise _broken(
                path,
                f"its {key} is {str(config[key])[:40]!r}; only models that give one vector for a "
                "text are supported, not late interaction (ColBERT)",
            )
    if kind == "Normalize":
        return ModuleConfig(kind, path)
    if kind == "LayerNorm":
        width = _width(path, config, "dimension")
        return ModuleConfig(kind, path, width, width)
    return ModuleConfig(
        kind,
        path,
        _width(path, config, "in_features"),
        _width(path, config, "out_features"),
        has_bias=config.get("bias") is not False,
        activation=activation(config.get("activation_function"), "Tanh"),
        has_residual=config.get("use_residual") is True,
    )


def load_module(module: ModuleConfig, read_other: TensorReader | None = None) -> Step:
    """Read the module's weights and return what it does to vectors (b, d).

    `read_other` reads files that are not safetensors; without it they are refused.
    Raises BrokenModel.
    """
    if module.kind == "Normalize":
        return unit
    tensors = _tensors(module.path, read_other)
    if module.kind == "LayerNorm":
        scale = _tensor(module, tensors, "norm.weight", (module.width,))
        shift = _tensor(module, tensors, "norm.bias", (module.width,))
        return lambda vectors: _layer_norm(vectors, scale, shift)
    return _dense(module, tensors)


def _dense(module: ModuleConfig, tensors: Mapping[str, NDArray[Any]]) -> Step:
    shape = (module.out_width, module.width)
    weight = _tensor(module, tensors, "linear.weight", shape)
    bias = np.zeros(module.out_width, np.float32)
    if module.has_bias:
        bias = _tensor(module, tensors, "linear.bias", (module.out_width,))
    is_projected = module.has_residual and module.width != module.out_width
    residual = _tensor(module, tensors, "residual.weight", shape) if is_projected else None

    def apply(vectors: Vectors) -> Vectors:
        made = activate(module.activation, vectors @ weight.T + bias)
        if module.has_residual:
            made = made + (vectors if residual is None else vectors @ residual.T)
        return np.asarray(made, np.float32)

    return apply


def _layer_norm(vectors: Vectors, scale: Vectors, shift: Vectors) -> Vectors:
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + _LAYER_NORM_EPSILON)
    return np.asarray(centred / deviation * scale + shift, np.float32)


def _tensors(path: Path, read_other: TensorReader | None) -> Mapping[str, NDArray[Any]]:
    file = path / _SAFETENSORS
    if file.is_file():
        return _read_safetensors(file)
    other = path / _PICKLE
    if not other.is_file():
        raise _broken(path, f"its weights ({_SAFETENSORS}) are missing; download them too")
    if read_other is None:
        raise _broken(path, f"its weights are a PyTorch file; save them as {_SAFETENSORS}")
    return read_other(other)


def _read_safetensors(file: Path) -> Mapping[str, NDArray[Any]]:
    from safetensors import SafetensorError, deserialize

    size = file.stat().st_size
    if size > _MAX_WEIGHT_BYTES:
        raise _broken(
            file.parent,
            f"its weights take {format_bytes(size)}, more than {format_bytes(_MAX_WEIGHT_BYTES)}",
        )
    try:
        entries = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
        return {name: _array(entry) for name, entry in entries}
    except (SafetensorError, ValueError, KeyError) as problem:
        raise _broken(
            file.parent, f"its weights cannot be read ({str(problem)[:200]})"
        ) from problem


def _array(entry: Mapping[str, Any]) -> NDArray[Any]:
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
    values = np.frombuffer(entry["data"], kind).reshape(entry["shape"])
    if entry["dtype"] == "BF16":
        # Its bits are the upper half of a float32's.
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _tensor(
    module: ModuleConfig, tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]
) -> Vectors:
    found = tensors.get(name)
    if found is None or found.shape != shape:
        actual = "is missing" if found is None else f"has the shape {found.shape}"
        raise _broken(module.path, f"its weight {name} {actual}; expected {shape}")
    return np.asarray(found, np.float32)


def _width(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= _MAX_WIDTH:
        raise _broken(path, f"its {key} is {str(value)[:40]!r}, not an integer to {_MAX_WIDTH}")
    return value


def _broken(path: Path, reason: str) -> BrokenModel:
    return BrokenModel(f"The module {path.name!r} of the embedding model: {reason}.", param="model")
