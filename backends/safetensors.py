"""Hugging Face folders with safetensors weights: on MLX where it can, else on PyTorch."""

from collections import Counter
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
)
from backends.hf.checks import check_folder, transformers_knows
from backends.hf.config import HfFolder, read_folder, weight_files
from backends.hf.folder import folder_info, is_mlx, quantization_of
from backends.hf.header import SafetensorsHeader, broken, safetensors_header
from backends.pytorch.loading import (
    estimate_torch,
    import_torch,
    limit_context_for_torch,
    open_torch,
    torch_availability,
)
from backends.pytorch.weights import refuse_quantized
from core.errors import BackendUnavailable, NotThisFormat
from core.types import Capability
from core.units import MIB

_SUFFIX = ".safetensors"


@runtime_checkable
class _MlxBackend(Protocol):
    """What another format's backend must offer to run these models."""

    def supports(self, model_type: str) -> bool:
        """Whether it knows the architecture."""
        ...


class SafetensorsBackend(Backend):
    """Folders of config.json and `*.safetensors`, but for those that MLX made.

    `ModelInfo.details` say what a model `runs_on`, "mlx" or "pytorch", and `runs_on_reason`.
    """

    name: ClassVar[str] = "safetensors"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 512 * MIB
    reserves_kv: ClassVar[bool] = False

    def availability(self) -> Availability:
        """Available where MLX or PyTorch is."""
        torch = torch_availability()
        mlx = _mlx()
        if torch.is_available or (mlx is not None and mlx.availability().is_available):
            return Availability(True)
        return torch

    def identify(self, path: Path) -> ModelInfo:
        """Read the weights' headers and the configuration."""
        path = path.absolute()
        if path.suffix != _SUFFIX:
            raise NotThisFormat(f"{path.name} is no safetensors file")
        first = safetensors_header(path)
        folder = read_folder(path.parent)
        if not folder.config.get("model_type"):
            raise NotThisFormat(f"{path.name} is a part of another model")
        files = weight_files(folder.path, "safetensors")
        if path not in files:
            raise NotThisFormat(f"{path.name} is not among the folder's weights")
        headers = [first if file == path else _shard(file) for file in files]
        if headers[0].metadata.get("format") == "mlx" or is_mlx(folder, headers[0]):
            raise NotThisFormat(f"{path.name} was made by MLX")
        return _info(folder, headers)

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import the runtime of `details["runs_on"]`."""
        mlx = _runtime(info)
        if mlx is None:
            import_torch()
        elif isinstance(mlx, Measured):
            mlx.preload(info, options)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return the bytes that the runtime of `details["runs_on"]` holds."""
        mlx = _runtime(info)
        return mlx.estimate(info, options) if mlx else estimate_torch(info, options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks for as long as reading the weights takes."""
        mlx = _runtime(info)
        return mlx.open(info, options) if mlx else open_torch(info, options)


def _shard(path: Path) -> SafetensorsHeader:
    try:
        return safetensors_header(path)
    except NotThisFormat:
        raise broken(path, "it is no safetensors file, though the index names it") from None


def _info(folder: HfFolder, headers: list[SafetensorsHeader]) -> ModelInfo:
    bytes_by_dtype: Counter[str] = Counter()
    for header in headers:
        bytes_by_dtype += header.bytes_by_dtype
    info = folder_info(
        SafetensorsBackend.name,
        folder,
        tuple(header.path for header in headers),
        parameters=sum(entry.elements for each in headers for entry in each.tensors.values()),
        weights_bytes=sum(bytes_by_dtype.values()),
        quantization=quantization_of(folder, bytes_by_dtype),
    )
    runtime, reason = _choose(folder, info)
    check_folder(folder, is_known=runtime == "mlx" or transformers_knows(folder.model_type))
    if runtime == "pytorch":
        refuse_quantized(folder)
        info = limit_context_for_torch(info, folder)
    chosen = {"runs_on": runtime, "runs_on_reason": reason}
    return replace(info, details={**info.details, **chosen})


def _choose(folder: HfFolder, info: ModelInfo) -> tuple[str, str]:
    """Return the runtime, "mlx" or "pytorch", and why; the same rule on every platform."""
    if Capability.EMBEDDING in info.capabilities:
        return "pytorch", "embedding models run on sentence-transformers"
    mlx = _mlx()
    if mlx is None:
        return "pytorch", "the MLX backend is not installed"
    available = mlx.availability()
    if not available.is_available:
        return "pytorch", f"MLX cannot run here: {available.reason}"
    # A nested configuration is loaded by its outer type.
    kind = str(folder.config.get("wrapper_model_type") or folder.config["model_type"])
    if cast(_MlxBackend, mlx).supports(kind):
        return "mlx", "MLX knows the architecture"
    return "pytorch", f"MLX does not know the architecture {kind[:60]}"


def _mlx() -> Backend | None:
    """Return the backend of MLX models, which formats reach through the registry alone."""
    from backends.registry import load_backends

    backend = load_backends().get("mlx")
    return backend if isinstance(backend, _MlxBackend) else None


def _runtime(info: ModelInfo) -> Backend | None:
    """Return the MLX backend where `info` runs on it; None for PyTorch."""
    if info.details.get("runs_on") != "mlx":
        return None
    mlx = _mlx()
    if mlx is None:
        raise BackendUnavailable("The MLX backend is not installed.", param="model")
    return mlx
