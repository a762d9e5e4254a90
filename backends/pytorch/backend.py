"""PyTorch backend: `pytorch_model*.bin` and state dicts with a config.json, on transformers."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from backends.hf.config import read_folder
from backends.hf.fit import check_only_runtime
from backends.pytorch.check import check_torch
from backends.pytorch.embedding import check_settings
from backends.pytorch.file import pytorch_info, torch_tensors
from backends.pytorch.loading import (
    estimate_torch,
    import_torch,
    limit_context_for_torch,
    open_torch,
    torch_availability,
)
from core.types import Capability
from core.units import MIB

_GENERATING = frozenset({Capability.CHAT, Capability.COMPLETION})


class PytorchBackend(Backend):
    """Runs folders with `pytorch_model*.bin` or a state dict beside a config.json."""

    name: ClassVar[str] = "pytorch"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 512 * MIB
    reserves_kv: ClassVar[bool] = False

    def availability(self) -> Availability:
        """Available where PyTorch and transformers are installed."""
        return torch_availability()

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import PyTorch and transformers."""
        del info, options
        import_torch()

    def identify(self, path: Path) -> ModelInfo:
        """Read the list of tensors with a restricted pickle reader, which runs no code."""
        info = pytorch_info(path)
        check_settings(info)
        return limit_context_for_torch(info, read_folder(info.files[0].parent))

    def start_checks(self, avoid: Collection[str], on_runtime: Callable[[str], None]) -> None:
        """Start nothing: PyTorch computes without threads in a limited process."""

    def check_runtimes(
        self, info: ModelInfo, avoid: Collection[str], on_runtime: Callable[[str], None]
    ) -> ModelInfo:
        """Return `info` if transformers can load its tensors; see `RuntimeChecked`."""
        if not self.availability().is_available or not info.capabilities & _GENERATING:
            return info
        fit = check_only_runtime(
            self.name,
            read_folder(info.files[0].parent),
            torch_tensors(info),
            check_torch,
            avoid=avoid,
            on_runtime=on_runtime,
        )
        # Files count shared weights once, but tables too; the model counts shared weights twice.
        return replace(info, parameters=min(info.parameters, fit.parameters))

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return weights, KV cache and buffers in bytes."""
        return estimate_torch(info, options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks while the weights are read."""
        return open_torch(info, options)
