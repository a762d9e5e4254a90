"""Backend for Hugging Face folders with safetensors weights; runs on MLX, else on PyTorch."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol, cast, runtime_checkable

from backends.abilities import Measured
from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
    RuntimeChoice,
)
from backends.hf.adapters import refuse_adapter
from backends.hf.checks import check_embedder, check_folder, transformers_knows
from backends.hf.config import HfFolder, read_folder, variant_files, weight_files
from backends.hf.folder import folder_info, is_mlx, quantization_of
from backends.hf.header import SafetensorsHeader, broken, safetensors_header
from backends.hf.layout import stored_weights
from backends.pytorch.embedding import check_settings
from backends.pytorch.loading import (
    estimate_torch,
    import_torch,
    limit_context_for_torch,
    open_torch,
    torch_availability,
)
from backends.pytorch.reference import is_small_enough, torch_reference
from backends.trials import OtherRuntimeNeeded, TrialOptions
from core.errors import BackendUnavailable, BrokenModel, NotThisFormat
from core.types import Capability
from core.units import MIB

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# Methods of quantization that mlx-lm reads exactly, with the architecture.
_MLX_READS = frozenset({("mxfp4", "gpt_oss")})


@runtime_checkable
class _MlxBackend(Protocol):
    """The part of the MLX backend that decides whether it can run a model."""

    def supports(self, model_type: str) -> bool:
        """Whether it supports the architecture."""
        ...


class SafetensorsBackend(Backend):
    """Folders of config.json and `*.safetensors`, except those that MLX made.

    `find_backend` returns another format's backend by name, None where it is not installed.
    `ModelInfo.choice` names the runtime, "mlx" or "pytorch"; `EngineOptions.runtime` overrides it.
    """

    name: ClassVar[str] = "safetensors"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 512 * MIB
    reserves_kv: ClassVar[bool] = False

    def __init__(self, find_backend: Callable[[str], Backend | None]) -> None:
        self._find_backend = find_backend

    def availability(self) -> Availability:
        """Available where MLX or PyTorch is."""
        torch = torch_availability()
        mlx = self._mlx()
        if torch.is_available or (mlx is not None and mlx.availability().is_available):
            return Availability(True)
        return torch

    def identify(self, path: Path) -> ModelInfo:
        """Read the weights' headers and the configuration."""
        path = path.absolute()
        if path.suffix != _SUFFIX:
            raise NotThisFormat(f"{path.name} is not a safetensors file")
        refuse_adapter(path)
        first = safetensors_header(path)
        folder = read_folder(path.parent)
        if not folder.config.get("model_type"):
            raise NotThisFormat(f"{path.name} is a part of another model")
        files = weight_files(folder.path, "safetensors")
        files = files if path in files else variant_files(path)
        if path not in files:
            raise NotThisFormat(f"{path.name} is not among the folder's weights")
        headers = [first if file == path else _shard(file) for file in files]
        if headers[0].metadata.get("format") == "mlx" or is_mlx(folder, headers[0]):
            raise NotThisFormat(f"{path.name} was made by MLX")
        return self._info(folder, headers)

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import the model's runtime, and that which it is compared with."""
        mlx = self._runtime(info, options)
        if mlx is None or (_can_use_torch(info, options) and is_small_enough(info)):
            import_torch()
        if mlx is not None and isinstance(mlx, Measured):
            mlx.preload(info, options)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return the bytes that the model's runtime needs."""
        mlx = self._runtime(info, options)
        return mlx.estimate(info, options) if mlx else estimate_torch(info, options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks while the weights are read.

        A model that MLX cannot load, or computes wrongly, is opened on PyTorch instead, unless the
        user has chosen MLX.
        """
        mlx = self._runtime(info, options)
        if mlx is None:
            return open_torch(info, options)
        if not _can_use_torch(info, options):
            return mlx.open(info, options)
        try:
            return mlx.open(info, replace(options, trial=_compared(info, options)))
        except OtherRuntimeNeeded as problem:
            reason = f"MLX computes it wrongly ({problem.reason})"
        except BrokenModel as problem:
            reason = problem.message
        return _open_instead(info, options, reason)

    def _info(self, folder: HfFolder, headers: list[SafetensorsHeader]) -> ModelInfo:
        stored = stored_weights(folder, headers)
        layout = stored.layout
        check_embedder(folder, layout, stored.names)
        bytes_by_dtype: Counter[str] = Counter()
        for entry in stored.tensors.values():
            bytes_by_dtype[entry.dtype] += entry.nbytes
        info = folder_info(
            self.name,
            folder,
            tuple(header.path for header in headers),
            parameters=stored.parameters,
            weights_bytes=sum(bytes_by_dtype.values()),
            quantization=layout.quantization or quantization_of(folder, bytes_by_dtype),
        )
        choice = _choose_runtime(folder, info, self._mlx(), layout.method)
        is_known = choice.runtime == "mlx" or transformers_knows(folder.model_type)
        check_folder(folder, is_known=is_known)
        if choice.runtime == "pytorch":
            check_settings(info)
            info = limit_context_for_torch(info, folder)
        elif layout.method:
            info = replace(info, details={**info.details, "mlx_bits": 4, "mlx_group_size": 32})
        return replace(info, choice=choice)

    def _mlx(self) -> Backend | None:
        backend = self._find_backend("mlx")
        return backend if isinstance(backend, _MlxBackend) else None

    def _runtime(self, info: ModelInfo, options: EngineOptions) -> Backend | None:
        """Return the MLX backend if `info` runs on it; None for PyTorch."""
        if info.choice is None or info.choice.resolve(options.runtime) != "mlx":
            return None
        mlx = self._mlx()
        if mlx is None:
            raise BackendUnavailable(
                "The MLX backend is not installed; install the package mlx-lm.", param="model"
            )
        return mlx


def _can_use_torch(info: ModelInfo, options: EngineOptions) -> bool:
    """Whether PyTorch can run a model in place of MLX, which the user did not choose."""
    if options.runtime == "mlx":
        return False
    if (
        info.capabilities & {Capability.EMBEDDING, Capability.RERANK}
        or not torch_availability().is_available
    ):
        return False
    return transformers_knows(read_folder(info.files[0].parent).model_type)


def _compared(info: ModelInfo, options: EngineOptions) -> TrialOptions:
    """Return how MLX tries a model that PyTorch can run: small ones are compared with it."""
    trial = replace(options.trial or TrialOptions(), has_alternative=True)
    if not is_small_enough(info):
        return trial
    return replace(trial, reference=lambda: torch_reference(info, trial.hold))


def _open_instead(info: ModelInfo, options: EngineOptions, reason: str) -> Engine:
    """Open a model on PyTorch because of what MLX computes."""
    text = f"{info.name} runs on PyTorch: {reason.rstrip('.')}."
    logger.warning("%s", text)
    info = limit_context_for_torch(info, read_folder(info.files[0].parent))
    engine = open_torch(replace(info, choice=RuntimeChoice("pytorch", text)), options)
    engine.limitations = (text, *engine.limitations)
    return engine


def _shard(path: Path) -> SafetensorsHeader:
    try:
        return safetensors_header(path)
    except NotThisFormat:
        raise broken(path, "it is not a safetensors file, though the index names it") from None


def _choose_runtime(
    folder: HfFolder, info: ModelInfo, mlx: Backend | None, method: str
) -> RuntimeChoice:
    """Return the runtime, "mlx" or "pytorch", and why; the same rule on every platform."""
    if info.capabilities & {Capability.EMBEDDING, Capability.RERANK}:
        return RuntimeChoice("pytorch", "embedding and reranking models run on PyTorch")
    if mlx is None:
        return RuntimeChoice("pytorch", "the MLX backend is not installed")
    available = mlx.availability()
    if not available.is_available:
        return RuntimeChoice("pytorch", f"MLX cannot run here: {available.reason}")
    # A nested configuration is loaded by its outer type.
    model_type = str(folder.config.get("wrapper_model_type") or folder.config["model_type"])
    if method and (method, model_type) not in _MLX_READS:
        reason = f"its {info.quantization} weights are dequantized, which MLX does not do"
        return RuntimeChoice("pytorch", reason)
    if cast(_MlxBackend, mlx).supports(model_type):
        return RuntimeChoice("mlx", "MLX supports the architecture")
    return RuntimeChoice("pytorch", f"MLX does not support the architecture {model_type[:60]}")
