"""Loads a model with mlx-lm: supported architectures, runtime settings, weights."""

import ast
import ctypes
import gc
import importlib.util
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from backends.hf.config import NESTED, HfFolder, plain_floats
from backends.hf.header import read_json
from backends.hf.names import model_names
from backends.mlx.metal import (
    computing,
    forget_memory,
    guard_metal,
    has_metal,
    limit_memory,
    settle_and_clear,
)
from backends.mlx.quantization import mlx_settings
from core.errors import BrokenModel, InsufficientMemory, NonFiniteOutput
from core.units import GIB, MIB

_TYPE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LIFTED = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
_MAX_REPEATS = 4096
_REPEATS = re.compile(r"(num_.*layers|n_layers?|num_.*experts|num_.*stages|.*num_blocks)")
# Freed buffers that MLX keeps for reuse; part of the memory estimate.
CACHE_BYTES = 256 * MIB
# Weights that are evaluated at once.
_PART_BYTES = 4 * GIB
_IMPORTING = threading.Lock()
_BLANK_FOLDER = Path(__file__).with_name("blank")


@cache
def _package() -> Path | None:
    spec = importlib.util.find_spec("mlx_lm")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


@cache
def _aliases() -> Mapping[str, str]:
    """Return mlx-lm's table of model types that use the code of another type."""
    package = _package()
    if package is None:
        return {}
    for node in ast.parse((package / "utils.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            return dict(ast.literal_eval(node.value))
    return {}


@cache
def module_source(model_type: str) -> str:
    """Return the text of mlx-lm's module for a `model_type`, empty if it has none."""
    package = _package()
    if package is None or not _TYPE.fullmatch(model_type):
        return ""
    module = package / "models" / f"{_aliases().get(model_type, model_type)}.py"
    return module.read_text("utf-8") if module.is_file() else ""


def supports(model_type: str) -> bool:
    """Whether mlx-lm supports this `model_type`; reads its source, does not import it."""
    text = module_source(model_type)
    return "class ModelArgs" in text and "class Model(" in text


def check_config(config: Mapping[str, Any]) -> None:
    """Reject configurations that run code or build too many layers.  Raises BrokenModel."""
    if config.get("model_file") is not None:
        raise BrokenModel(
            "The model's config.json names Python code to run (model_file), which is not allowed.",
            param="model",
        )
    for key, value in config.items():
        if isinstance(value, dict):
            check_config(value)
        elif _REPEATS.fullmatch(key) and isinstance(value, int) and value > _MAX_REPEATS:
            raise BrokenModel(
                f"The model's config.json has {key}={value}; at most {_MAX_REPEATS} is allowed.",
                param="model",
            )


def _preload_blas(threads: int) -> None:
    """Make MLX use PyTorch's BLAS: the one in MLX's wheel for Linux is twenty times slower.

    Its symbols must be loaded before MLX.  Does nothing if torch is not installed.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(place) / "lib" / "libtorch_cpu.so"
        if library.is_file():
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


@contextmanager
def _keep_file_limit() -> Iterator[None]:
    """Keep the process's limit of open files, which importing mlx-lm would lower."""
    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = original


def import_runtime(threads: int) -> None:
    """Import MLX and mlx-lm; blocks for 1 to 2 s the first time."""
    with _IMPORTING:
        if "mlx_lm.generate" not in sys.modules:
            _preload_blas(threads)
            with _keep_file_limit():
                import mlx_lm.generate  # noqa: F401
            import mlx.core as mx

            mx.set_cache_limit(CACHE_BYTES)
        guard_metal()


def runtime_config(
    raw: Mapping[str, Any], flat: Mapping[str, Any], *, is_embedder: bool
) -> dict[str, Any]:
    """Return the config.json `raw` with the rotary settings where mlx-lm's models look for them.

    Most of them ignore `rope_parameters` of transformers 5, and then generate nonsense.  `flat` is
    the same configuration as `HfFolder.config` has it.
    """
    config: dict[str, Any] = plain_floats(raw)
    lifted = {key: flat[key] for key in _LIFTED if flat.get(key) is not None}
    for level in (config, *(config.get(key) for key in NESTED)):
        if isinstance(level, dict):
            for key, value in lifted.items():
                if level.get(key) is None:
                    level[key] = value
    quantization = mlx_settings(config)
    if quantization is not None:
        config["quantization"] = quantization
    if is_embedder:
        # Embedding models are saved without an output head.
        config["tie_word_embeddings"] = True
    return config


def _loader(model_class: Any, weights: Mapping[str, Any]) -> Any:
    """Return a subclass that loads `weights` instead of files; each must match a parameter."""

    def sanitize(self: Any, _: Mapping[str, Any]) -> Any:
        found = dict(weights)
        if hasattr(model_class, "sanitize"):
            return model_class.sanitize(self, found)
        return found

    def load_weights(self: Any, found: Any, strict: bool = True) -> Any:
        del strict
        return model_class.load_weights(self, found, strict=True)

    return type("Loaded", (model_class,), {"sanitize": sanitize, "load_weights": load_weights})


class CpuClock:
    """Measures the CPU time of the calling thread and, on Linux, of MLX's own threads.

    Create it before the first computation: threads that appear until `settle` are MLX's.
    """

    def __init__(self) -> None:
        self._before = self._threads()
        self._clocks: tuple[int, ...] = ()

    @staticmethod
    def _threads() -> set[int]:
        folder = Path("/proc/self/task")
        return {int(each.name) for each in folder.iterdir()} if folder.is_dir() else set()

    def settle(self) -> None:
        """Register the threads that are new as MLX's."""
        python = {thread.native_id for thread in threading.enumerate()}
        # Source: clock_gettime(2) on Linux; 6 selects the CPU time of one thread.
        self._clocks = tuple((~each << 3) | 6 for each in self._threads() - self._before - python)

    def seconds(self) -> float:
        """Return the CPU seconds so far; only differences are meaningful."""
        total = time.thread_time()
        for clock in self._clocks:
            try:
                total += time.clock_gettime(clock)
            except OSError:
                continue
        return total


class MlxModel:
    """The weights of one model; created, used and closed on one thread."""

    def __init__(
        self,
        folder: HfFolder,
        weights: tuple[Path, ...],
        *,
        threads: int,
        is_dense: bool,
        granted_bytes: int = 0,
        budget_bytes: int | None = None,
    ) -> None:
        """Load the weights; blocks.  `is_dense` dequantizes them to float32.

        `granted_bytes` is this model's memory and `budget_bytes` that of all models, for the limits
        of MLX on Metal.  Sets `can_cut`: whether a sequence's cache can be cut at any length.
        Raises BrokenModel, InsufficientMemory.
        """
        import_runtime(threads)
        self.clock = CpuClock()
        raw = read_json(folder.path / "config.json")
        check_config(raw)
        if granted_bytes:
            limit_memory(id(self), granted_bytes, budget_bytes)
        try:
            self._open(folder, raw, weights, is_dense=is_dense)
        except BaseException:
            forget_memory(id(self))
            raise

    def _open(
        self, folder: HfFolder, raw: Mapping[str, Any], files: tuple[Path, ...], *, is_dense: bool
    ) -> None:
        self.model = _guarded(folder, lambda: _load(folder, raw, files, is_dense=is_dense))
        self.vocabulary_size = _guarded(folder, lambda: self._compute_one_token(folder.path.name))
        self.clock.settle()

    def _compute_one_token(self, name: str) -> int:
        """Detect mismatched shapes and non-finite weights; return the vocabulary size."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        kinds = make_prompt_cache(self.model)
        self.can_cut = all(isinstance(each, KVCache) for each in kinds)
        if not all(hasattr(each, "merge") for each in kinds):
            raise ValueError(f"its cache {type(kinds[0]).__name__} cannot hold several sequences")
        with computing(), mx.stream(generation_stream):
            logits = self.model(mx.array([[0]]), cache=kinds)[0, -1].astype(mx.float32)
            if not mx.isfinite(logits).all().item():
                raise BrokenModel(NonFiniteOutput.of("logits", name).message, param="model")
        arrays = [a for each in kinds for a in (each.keys, each.values)] if self.can_cut else []
        # One row's (heads, width) of keys and values, layer by layer.
        self.cache_shapes = tuple((int(a.shape[1]), int(a.shape[3])) for a in arrays)
        self.cache_dtypes = tuple(a.dtype for a in arrays)
        return int(logits.shape[-1])

    def close(self) -> None:
        """Free the memory; idempotent."""
        self.model = None
        gc.collect()
        settle_and_clear()
        forget_memory(id(self))


def _load(
    folder: HfFolder, raw: Mapping[str, Any], files: tuple[Path, ...], *, is_dense: bool
) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    config = runtime_config(raw, folder.config, is_embedder=folder.is_embedder)
    weights: dict[str, Any] = {}
    for file in files:
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        weights |= arrays
    weights = {new: weights[old] for old, new in model_names(files[0], weights).items()}
    model = build_model(config, weights, is_embedder=folder.is_embedder)
    weights.clear()
    if is_dense:
        model = dequantize_model(model)
    if not has_metal():
        # Half precision is many times slower on a CPU.
        model.set_dtype(mx.float32)
    for part in _parts(model):
        with computing():
            mx.eval(part)
    return model


def _parts(model: Any) -> Iterator[list[Any]]:
    """Yield the weights in parts of at most 4 GiB, or one array.

    Evaluated at once, those of a large model keep the GPU longer than its watchdog allows.
    Source: mlx-lm issue 1572.
    """
    from mlx.utils import tree_flatten

    part: list[Any] = []
    size = 0
    for _, array in tree_flatten(model.parameters()):
        if part and size + array.nbytes > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(array)
        size += array.nbytes
    yield part


def build_model(config: dict[str, Any], weights: dict[str, Any], *, is_embedder: bool) -> Any:
    """Return mlx-lm's model of `config` with these weights, by name; computes nothing yet.

    Raises what mlx-lm raises, also for weights that do not match the model's parameters exactly.
    """
    from mlx_lm.utils import load_model

    if is_embedder and not any(name.startswith("model.") for name in weights):
        weights = {f"model.{name}": array for name, array in weights.items()}

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, arguments = _model_classes(config)
        return _loader(model_class, weights), arguments

    # The folder is blank: no other weights are read, and no code beside them.
    model, _ = load_model(
        _BLANK_FOLDER,
        lazy=True,
        strict=False,
        model_config=config,
        get_model_classes=classes,
    )
    return model


def _model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Import the architecture's module.  Raises ImportError also for one that ends its process."""
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)  # type: ignore[no-any-return]
    except SystemExit as problem:
        raise ImportError(
            f"its code for {str(config.get('model_type'))[:60]!r} ends the process that imports it"
        ) from problem


def _guarded(folder: HfFolder, work: Callable[[], Any]) -> Any:
    """Run `work`; turn exceptions of mlx-lm into BrokenModel or InsufficientMemory."""
    try:
        return work()
    except MemoryError as problem:
        raise InsufficientMemory(
            f"The model {folder.path.name} does not fit into memory. Unload other models or use a "
            "smaller quantization.",
            param="model",
        ) from problem
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as problem:
        reason = f"{type(problem).__name__}: {problem}"[:500]
        raise BrokenModel(
            f"The model {folder.path.name} cannot be loaded by mlx-lm: {reason}", param="model"
        ) from problem
