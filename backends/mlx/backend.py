"""The MLX backend: runs MLX models, and safetensors models that mlx-lm supports."""

import importlib.util
import sys
from collections.abc import Callable, Collection
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
from backends.hf.engine import open_token_engine
from backends.hf.fit import check_only_runtime
from backends.hf.folder import read_folder
from backends.hf.tokenizer import HfTokenizer
from backends.mlx.check import check_mlx, start_runtime
from backends.mlx.embedding import check_encoder, open_embedder
from backends.mlx.file import mlx_info, mlx_tensors
from backends.mlx.memory import estimate_mlx, wants_dense
from backends.mlx.model import MlxModel, check_config, import_runtime
from backends.mlx.model import supports as has_code_for
from backends.mlx.stepper import MlxStepper
from backends.mlx.trial import try_model
from backends.trials import tell
from core.errors import BackendUnavailable, BrokenModel
from core.types import Capability
from core.units import MIB

_WEIGHTS = (".safetensors", ".npz")


class MlxBackend(Backend):
    """Runs Hugging Face folders with weights in MLX's form, as safetensors or npz."""

    name: ClassVar[str] = "mlx"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 384 * MIB
    reserves_kv: ClassVar[bool] = False

    def availability(self) -> Availability:
        """Available where MLX and mlx-lm are installed: on Apple silicon, or Linux's CPU."""
        for package in ("mlx", "mlx_lm"):
            if importlib.util.find_spec(package) is None:
                return Availability(False, f"{package} is not installed; run scripts/setup")
        if sys.platform not in ("darwin", "linux"):
            return Availability(False, "MLX runs on macOS and Linux only")
        return Availability(True)

    def supports(self, model_type: str) -> bool:
        """Whether mlx-lm supports this architecture; does not import it."""
        return self.availability().is_available and has_code_for(model_type)

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import MLX and mlx-lm."""
        del info
        import_runtime(options.threads)

    def start_checks(self, avoid: Collection[str], on_runtime: Callable[[str], None]) -> None:
        """Start MLX's thread; see `RuntimeChecked`."""
        if self.availability().is_available and "mlx" not in avoid:
            on_runtime("mlx")
            start_runtime()

    def check_runtimes(
        self, info: ModelInfo, avoid: Collection[str], on_runtime: Callable[[str], None]
    ) -> ModelInfo:
        """Return `info` if mlx-lm can load its tensors; see `RuntimeChecked`."""
        if not self.availability().is_available:
            return info
        check_only_runtime(
            self.name,
            read_folder(info.files[0].parent),
            mlx_tensors(info),
            check_mlx,
            avoid=avoid,
            on_runtime=on_runtime,
        )
        return info

    def identify(self, path: Path) -> ModelInfo:
        """Read the headers of the weights and the configuration beside them."""
        info = mlx_info(path)
        check_encoder(info)
        return info

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return weights, KV cache and compute buffers in bytes, also for safetensors models."""
        return estimate_mlx(info, options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model, also one of format safetensors; blocks while the weights are read."""
        available = self.availability()
        if not available.is_available:
            raise BackendUnavailable(available.reason)
        granted = self.estimate(info, options)
        is_dense = wants_dense(info, options)
        options = options.granted(granted)
        folder = read_folder(info.files[0].parent)
        check_config(folder.config)
        model_type = folder.outer_type
        if not has_code_for(model_type):
            raise BrokenModel(
                f"mlx-lm does not support the architecture {model_type[:60]!r}.", param="model"
            )
        weights = tuple(file for file in info.files if file.suffix in _WEIGHTS)

        def load() -> MlxModel:
            return MlxModel(
                folder,
                weights,
                threads=options.threads,
                is_dense=is_dense,
                granted_bytes=granted.total_bytes,
                budget_bytes=options.memory_limit_bytes,
            )

        if Capability.EMBEDDING in info.capabilities:
            return open_embedder(info, folder, load, options)
        tokenizer = HfTokenizer(folder.path)

        def open_stepper() -> MlxStepper:
            model, result = try_model(info, folder.config, load, options, is_dense=is_dense)
            stepper = MlxStepper(model, tokenizer, options, result)
            stepper.limitations = tell(info.name, result)
            return stepper

        return open_token_engine(
            info,
            folder,
            tokenizer,
            open_stepper,
            options,
            context_tokens=granted.context_tokens,
        )
