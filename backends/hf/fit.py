"""What a runtime's check of a model folder found, and limits of sizes that a folder claims."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from backends.hf.config import LAYER_KEYS, HfFolder
from backends.hf.header import broken
from core.errors import BackendUnavailable

# Why a runtime is to be avoided.
CHECK_ENDED = "its code ended the process that checked it, or took too long"
# safetensors' name: that of MLX and of PyTorch, for the types that both have.
SHARED_DTYPES: Mapping[str, str] = MappingProxyType({
    "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "C64": "complex64",
})  # fmt: skip
_REPEATS = re.compile(r"(moe_)?(num|n)_.*(layers|experts|stages|blocks)|.*_layers_per_.*")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size", "padded_vocab_size")
_MAX_REASON = 300
_MAX_UNUSED_EXPERTS = 2**16
# The reason against a runtime that an earlier check did not survive.
CHECK_ENDED = "its code ended the process that checked it, or took too long"


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One stored tensor; `dtype` is named as in safetensors."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RuntimeFit:
    """Whether a runtime can load a model: `reason` says why not, empty if it can.

    `parameters` is the number of weights that it computes with, 0 if unknown.
    """

    reason: str = ""
    parameters: int = 0


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether two runtimes computed the same from the same weights.

    `error` is the largest relative error of a position's logits.  `within_window` is the one of the
    positions up to the sliding window only.  `failure` says why the other runtime computed nothing,
    `unknown` why they could not be compared.
    """

    error: float = 0.0
    within_window: float = 0.0
    failure: str = ""
    unknown: str = ""


class ComputeFailed(Exception):
    """A runtime built a model and failed to compute with it."""


def first_line(problem: BaseException) -> str:
    """Return an exception's first line, at most 300 characters, else the name of its type."""
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__)[:_MAX_REASON]


@contextmanager
def importing(libraries: str) -> Iterator[None]:
    """Raise BackendUnavailable for what an import in the body raises, except MemoryError."""
    try:
        yield
    except MemoryError:
        raise
    except (Exception, SystemExit) as problem:
        raise BackendUnavailable(
            f"{libraries} cannot be imported: {first_line(problem)}", param="model"
        ) from problem


def check_claims(folder: HfFolder, tensors: Mapping[str, TensorShape]) -> None:
    """Raise BrokenModel if config.json claims sizes that its tensors cannot have.

    Building such a model could take any amount of time and memory.  Nested configurations, such as
    that of an image encoder, are checked as well.
    """
    longest = max((max(each.shape, default=0) for each in tensors.values()), default=0)
    levels: list[Mapping[str, Any]] = [folder.config]
    for level in levels:
        levels += [value for value in level.values() if isinstance(value, Mapping)]
        for key, value in level.items():
            limit = _limit(key, len(tensors), longest)
            # Dense models of some architectures keep the default number of experts.
            if limit is not None and "experts" in key and level.get("is_moe") is False:
                limit = max(limit, _MAX_UNUSED_EXPERTS)
            if limit is not None and type(value) is int and value > limit:
                raise broken(
                    folder.path / "config.json",
                    f"it claims {key}={value}, but its weights have {len(tensors)} tensors, none "
                    f"longer than {longest}; download the folder's files from one source",
                )


def check_only_runtime(
    runtime: str,
    folder: HfFolder,
    tensors: Mapping[str, TensorShape],
    check: Callable[[HfFolder, Mapping[str, TensorShape]], RuntimeFit],
    *,
    avoid: Collection[str],
    on_runtime: Callable[[str], None],
) -> RuntimeFit:
    """Return what `check` found of the one runtime that a format has.

    Raises BrokenModel if it cannot load the model, what `check_claims` and `check` raise.  `avoid`
    and `on_runtime` are those of `RuntimeChecked`.
    """
    check_claims(folder, tensors)
    fit = RuntimeFit(CHECK_ENDED)
    if runtime not in avoid:
        on_runtime(runtime)
        fit = check(folder, tensors)
    if fit.reason:
        raise broken(folder.path / "config.json", fit.reason)
    return fit


def _limit(key: str, count: int, longest: int) -> int | None:
    """Return the largest value of a setting with `count` tensors, the longest being `longest`."""
    if key in LAYER_KEYS:
        return count
    if key in _WIDTHS:
        return longest
    return max(count, longest) if _REPEATS.fullmatch(key) else None
