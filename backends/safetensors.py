"""Backend for Hugging Face folders with safetensors weights; runs on MLX, else on PyTorch."""

import logging
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

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
from backends.hf.checks import check_folder, transformers_knows
from backends.hf.config import HfFolder, read_folder, variant_files, weight_files
from backends.hf.fit import CHECK_ENDED
from backends.hf.folder import folder_info, is_mlx, quantization_of
from backends.hf.header import (
    SafetensorsHeader,
    TensorEntry,
    broken,
    count_bytes,
    safetensors_header,
)
from backends.hf.layout import StoredWeights, WeightLayout, dense_tensors, stored_weights
from backends.pytorch.embedding import check_settings
from backends.pytorch.loading import (
    estimate_torch,
    import_torch,
    limit_context_for_torch,
    open_torch,
    torch_availability,
)
from backends.pytorch.reference import is_small_enough, torch_reference
from backends.runtime_check import (
    ENCODER_REASON,
    GENERATING,
    Excluded,
    check_runtimes,
    guess_runtime,
)
from backends.trials import OtherRuntimeNeeded, TrialOptions
from core.errors import BackendUnavailable, BrokenModel, NotThisFormat
from core.units import MIB

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_MLX_CONTEXT, _TORCH_CONTEXT = "mlx_context", "pytorch_context"
# Tables that older exporters stored beside the weights.
_TABLES = re.compile(
    r"(rotary_emb|rope|rotary_pos_emb)\.(inv_freq|freqs|cos_cached|sin_cached|cos|sin)$"
    r"|\.(masked_bias|position_ids|embed_positions\.weights)$"
)
_MASK = re.compile(r"\.(attn|attention)\.bias$")
_MASK_RANK = 4


@runtime_checkable
class _MlxBackend(Protocol):
    """The part of the MLX backend that this one uses."""

    def availability(self) -> Availability:
        """Whether MLX runs here."""
        ...

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return the bytes that `info` needs on MLX."""
        ...

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model on MLX."""
        ...

    def supports(self, model_type: str) -> bool:
        """Whether it supports the architecture."""
        ...

    def start_checks(self, avoid: Collection[str], on_runtime: Callable[[str], None]) -> None:
        """Start MLX's thread, if MLX runs here; see `RuntimeChecked`."""
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
        info, mlx = self._limited(info, options), self._runtime(info, options)
        return mlx.estimate(info, options) if mlx else estimate_torch(info, options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks while the weights are read.

        A model that MLX cannot load, or computes wrongly, is opened on PyTorch instead, unless the
        user has chosen MLX.
        """
        info, mlx = self._limited(info, options), self._runtime(info, options)
        if mlx is None:
            return open_torch(info, options)
        if not _can_use_torch(info, options):
            return mlx.open(info, options)
        try:
            return mlx.open(info, replace(options, trial=_compared(info, options)))
        except OtherRuntimeNeeded as problem:
            try:
                return _open_instead(info, options, f"MLX computes it wrongly ({problem.reason})")
            except BrokenModel as refusal:
                logger.warning("%s cannot run on PyTorch: %s", info.name, refusal.message)
                return mlx.open(info, options)
        except BrokenModel as problem:
            if problem.__cause__ is None:
                # The files are at fault, not mlx-lm.
                raise
            with suppress(BrokenModel):
                return _open_instead(info, options, problem.message)
            raise

    def start_checks(self, avoid: Collection[str], on_runtime: Callable[[str], None]) -> None:
        """Start MLX's thread; see `RuntimeChecked`."""
        mlx = self._mlx()
        if mlx is not None:
            mlx.start_checks(avoid, on_runtime)

    def check_runtimes(
        self, info: ModelInfo, avoid: Collection[str], on_runtime: Callable[[str], None]
    ) -> ModelInfo:
        """Return `info` with the runtime that loads its tensors; see `RuntimeChecked`."""
        if not info.capabilities & GENERATING:
            return info
        folder = read_folder(info.files[0].parent)
        headers = [safetensors_header(path) for path in info.files if path.suffix == _SUFFIX]
        stored = stored_weights(folder, headers)
        checked = check_runtimes(
            folder,
            stored.shapes,
            self._excluded(folder, stored.layout, avoid),
            on_runtime,
            dense=dense_tensors(stored.layout, stored.tensors),
        )
        details = {**info.details}
        if checked.mlx_context is not None:
            details[_MLX_CONTEXT] = checked.mlx_context
        info = replace(
            info,
            choice=checked.choice,
            parameters=checked.parameters or info.parameters,
            details=details,
        )
        return _limited_context(info, folder)

    def _info(self, folder: HfFolder, headers: list[SafetensorsHeader]) -> ModelInfo:
        stored = stored_weights(folder, headers)
        layout = stored.layout
        bytes_by_dtype = count_bytes(stored.tensors.values())
        info = folder_info(
            self.name,
            folder,
            tuple(header.path for header in headers),
            parameters=_parameters(stored),
            weights_bytes=sum(bytes_by_dtype.values()),
            quantization=layout.quantization or quantization_of(bytes_by_dtype),
            details={"mlx_bits": 4, "mlx_group_size": 32} if _stays_packed(folder, layout) else {},
        )
        if not info.capabilities & GENERATING:
            choice = RuntimeChoice("pytorch", ENCODER_REASON)
        else:
            choice = guess_runtime(folder, self._excluded(folder, layout, ()))
        is_known = choice.runtime == "mlx" or transformers_knows(folder.model_type)
        check_folder(folder, is_known=is_known)
        if choice.runtime == "pytorch":
            check_settings(info)
        return _limited_context(replace(info, choice=choice), folder)

    def _excluded(self, folder: HfFolder, layout: WeightLayout, avoid: Collection[str]) -> Excluded:
        """Return why a runtime cannot run the model, as far as that needs no check of it."""
        model_type = folder.outer_type
        mlx, torch = self._why_not_mlx(), torch_availability().reason
        backend = self._mlx()
        if layout.method and not _stays_packed(folder, layout):
            mlx = mlx or f"its {layout.quantization} weights are dequantized, which MLX does not do"
        if not mlx and not (backend and backend.supports(model_type)):
            mlx = f"MLX does not support the architecture {model_type[:60]}"
        return Excluded(
            CHECK_ENDED if "mlx" in avoid else mlx, CHECK_ENDED if "pytorch" in avoid else torch
        )

    def _why_not_mlx(self) -> str:
        mlx = self._mlx()
        if mlx is None:
            return "the MLX backend is not installed"
        available = mlx.availability()
        return "" if available.is_available else f"MLX cannot run here: {available.reason}"

    def _mlx(self) -> _MlxBackend | None:
        backend = self._find_backend("mlx")
        return backend if isinstance(backend, _MlxBackend) else None

    def _runtime(self, info: ModelInfo, options: EngineOptions) -> _MlxBackend | None:
        """Return the MLX backend if `info` runs on it; None for PyTorch."""
        if info.choice is None or info.choice.resolve(options.runtime) != "mlx":
            return None
        mlx = self._mlx()
        if mlx is None:
            raise BackendUnavailable(
                "The MLX backend is not installed; install the package mlx-lm.", param="model"
            )
        return mlx

    @staticmethod
    def _limited(info: ModelInfo, options: EngineOptions) -> ModelInfo:
        """Return `info` with the context that the runtime in use can take."""
        runtime = "pytorch" if info.choice is None else info.choice.resolve(options.runtime)
        limit = info.details.get(f"{runtime}_context")
        if not isinstance(limit, int) or limit >= info.context_length:
            return info
        return replace(info, context_length=limit)


def _can_use_torch(info: ModelInfo, options: EngineOptions) -> bool:
    """Whether PyTorch can run a model in place of MLX, which the user did not choose."""
    if options.runtime == "mlx":
        return False
    return info.choice is not None and info.choice.alternative == "pytorch"


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


def _limited_context(info: ModelInfo, folder: HfFolder) -> ModelInfo:
    """Note the context that each runtime can take, and show that of the chosen one."""
    torch_context = limit_context_for_torch(info, folder).context_length
    if torch_context < info.context_length:
        info = replace(info, details={**info.details, _TORCH_CONTEXT: torch_context})
    chosen = info.choice.runtime if info.choice else "pytorch"
    limit = info.details.get(f"{chosen}_context")
    return replace(info, context_length=limit) if isinstance(limit, int) else info


def _stays_packed(folder: HfFolder, layout: WeightLayout) -> bool:
    """Whether mlx-lm reads the quantized weights as they are, exactly."""
    return layout.method == "mxfp4" and folder.outer_type == "gpt_oss"


def _parameters(stored: StoredWeights) -> int:
    """Return the number of weights, unpacked, without rotary tables and masks."""
    plain = ((name, stored.tensors[name]) for name in stored.layout.plain)
    return stored.layout.packed_parameters + sum(
        entry.elements for name, entry in plain if not _is_buffer(name, entry)
    )


def _is_buffer(name: str, entry: TensorEntry) -> bool:
    is_mask = len(entry.shape) == _MASK_RANK and _MASK.search(name)
    return bool(is_mask or _TABLES.search(name))


def _shard(path: Path) -> SafetensorsHeader:
    try:
        return safetensors_header(path)
    except NotThisFormat:
        raise broken(path, "it is not a safetensors file, though the index names it") from None
