"""Pools token vectors into text vectors, as sentence-transformers folders configure it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BrokenModel

_MAX_JSON_BYTES = 1024 * 1024
# In the order in which a model that uses several concatenates them.
# Source: sentence_transformers, modules/pooling.py.
_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, str] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_SUPPORTED_MODULES = frozenset({"Transformer", "Pooling", "Normalize", "Dropout"})


@dataclass(frozen=True, slots=True)
class Pooling:
    """How token vectors are pooled; `mode` is one of `MODES`, or several joined by "+".

    `normalize` makes unit vectors.  `max_tokens` is the longest text that the model was trained
    for, including its special tokens; None if the folder does not say.
    """

    mode: str = "mean"
    normalize: bool = True
    max_tokens: int | None = None


def read_pooling(folder: Path) -> Pooling:
    """Read the pooling settings of a model's folder; the default is mean and unit vectors.

    Raises BrokenModel for damaged files, and for unsupported modules: skipping one would
    silently give different vectors.
    """
    max_tokens = _max_tokens(_read_object(folder / "sentence_bert_config.json"))
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return Pooling(max_tokens=max_tokens)
    if not isinstance(modules, list):
        raise BrokenModel(
            "modules.json is not a list of modules; download it again.", param="model"
        )
    kinds: list[str] = []
    mode = "mean"
    for module in modules:
        kind, path = _module_entry(module)
        if kind not in _SUPPORTED_MODULES:
            raise BrokenModel(
                f"The embedding model uses the module {kind!r}, which is not supported; supported "
                f"are {', '.join(sorted(_SUPPORTED_MODULES))}.",
                param="model",
            )
        if kind == "Pooling":
            mode = _pooling_mode(_read_object(_path_inside(folder, path) / "config.json"))
        kinds.append(kind)
    return Pooling(mode, "Normalize" in kinds, max_tokens)


def pool(
    hidden: NDArray[np.floating[Any]], mask: NDArray[Any], pooling: Pooling
) -> NDArray[np.float32]:
    """Pool `hidden` (b, t, d) into vectors, float32 (b, d).

    `mask` (b, t) is 0 at padding, which may be on either side.  Several modes give a vector of
    d values each, concatenated.  A row without tokens gives zeros.
    """
    weights = np.asarray(mask, np.float32)
    values = np.asarray(hidden, np.float32)
    vectors = [_POOLERS[mode](values, weights) for mode in pooling.mode.split("+")]
    joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
    return unit(joined) if pooling.normalize else joined


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalise `vectors` (b, d) to unit length; zeros stay zeros, NaN and infinity give NaN."""
    # Squares of large float32 values overflow it.
    exact = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(exact / np.where(lengths == 0, 1, lengths), np.float32)


def _mean(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    counts = _at_least_one(weights.sum(axis=1, keepdims=True))
    return np.asarray(_weighted_sum(values, weights) / counts, np.float32)


def _mean_sqrt_len(
    values: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    counts = _at_least_one(weights.sum(axis=1, keepdims=True))
    return np.asarray(_weighted_sum(values, weights) / np.sqrt(counts), np.float32)


def _weighted_mean(
    values: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Weight each token by its position, counted from one."""
    return _mean(values, weights * np.cumsum(weights, axis=1))


def _max(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = np.where(weights[:, :, None] > 0, values, -np.inf).max(axis=1)
    has_tokens = weights.sum(axis=1, keepdims=True) > 0
    return np.asarray(np.where(has_tokens, largest, 0), np.float32)


def _cls(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return _at(values, weights, np.argmax(weights > 0, axis=1))


def _last(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    from_end = np.argmax(weights[:, ::-1] > 0, axis=1)
    return _at(values, weights, weights.shape[1] - 1 - from_end)


def _at(
    values: NDArray[np.float32], weights: NDArray[np.float32], places: NDArray[np.intp]
) -> NDArray[np.float32]:
    rows = np.arange(len(values))
    has_tokens = weights[rows, places] > 0
    return np.asarray(values[rows, places] * has_tokens[:, None], np.float32)


def _weighted_sum(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    # Padding may hold anything, NaN too, so it is replaced instead of multiplied by zero.
    kept = np.where(weights[:, :, None] > 0, values, 0)
    return np.asarray(np.einsum("btd,bt->bd", kept, weights), np.float32)


def _at_least_one(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.maximum(counts, 1), np.float32)


_Pooler = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
_POOLERS: Mapping[str, _Pooler] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "weighted_mean": _weighted_mean,
    "last": _last,
}
MODES = tuple(_POOLERS)


def _pooling_mode(config: Mapping[str, Any]) -> str:
    """Return the mode of a pooling config: its `pooling_mode`, or the older boolean flags."""
    named = config.get("pooling_mode")
    if named is None:
        chosen = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True]
        return "+".join(chosen) or "mean"
    names: Sequence[Any] = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names:
        raise BrokenModel("pooling_mode in the pooling's config.json names no mode.", param="model")
    unknown = [name for name in names if not isinstance(name, str) or name not in _NAMES]
    if unknown:
        raise BrokenModel(
            f"The pooling mode {str(unknown[0])[:50]!r} is not supported.", param="model"
        )
    return "+".join(dict.fromkeys(_NAMES[name] for name in names))


def _module_entry(module: Any) -> tuple[str, str]:
    if not isinstance(module, dict):
        raise BrokenModel("An entry of modules.json is not an object.", param="model")
    kind, path = module.get("type"), module.get("path", "")
    if not isinstance(kind, str) or not isinstance(path, str):
        raise BrokenModel("A module in modules.json has no type or an invalid path.", param="model")
    return kind.rsplit(".", 1)[-1][:50], path


def _path_inside(folder: Path, path: str) -> Path:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise BrokenModel(
            "A module in modules.json has a path outside the model's folder.", param="model"
        )
    return folder / path


def _max_tokens(config: Mapping[str, Any]) -> int | None:
    value = config.get("max_seq_length")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BrokenModel(
            "max_seq_length in sentence_bert_config.json is not a positive integer.", param="model"
        )
    return value


def _read_object(path: Path) -> Mapping[str, Any]:
    value = _read_json(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BrokenModel(f"{path.name} is not a JSON object.", param="model")
    return value


def _read_json(path: Path) -> Any:
    """Return the JSON in a file, None if there is no file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BrokenModel(
            f"{path.name} cannot be read ({error.strerror}).", param="model"
        ) from error
    if len(data) > _MAX_JSON_BYTES:
        raise BrokenModel(f"{path.name} is larger than the limit of 1 MiB.", param="model")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenModel(
            f"{path.name} is not valid JSON; download it again.", param="model"
        ) from error
