"""Backend of Apple's on-device language model, through apple-fm-sdk; it has no files."""

import importlib.util
import sys
from pathlib import Path
from typing import ClassVar

from backends.apple.engine import AppleEngine
from backends.apple.sdk import import_sdk
from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from core.errors import BackendUnavailable, NotThisFormat
from core.machine import macos_release
from core.types import Capability

# Source: Apple, TN3193 "Managing the on-device foundation model's context window".
CONTEXT_TOKENS = 4096
_OLDEST_MACOS = 26
_REASONS = {
    "APPLE_INTELLIGENCE_NOT_ENABLED": "Apple Intelligence is off; turn it on in System Settings",
    "DEVICE_NOT_ELIGIBLE": "this Mac is not eligible for Apple Intelligence",
    "MODEL_NOT_READY": "macOS has not finished downloading the model; try again later",
}


class AppleFoundationBackend(Backend):
    """Runs the model that is part of macOS 26; listed everywhere, available on macOS only."""

    name: ClassVar[str] = "apple-foundation"
    starts_on_demand: ClassVar[bool] = True

    def availability(self) -> Availability:
        """Available on macOS 26 and later with Apple Intelligence on and the SDK installed."""
        reason = system_problem(sys.platform, macos_release()) or _model_problem()
        return Availability(not reason, reason)

    def identify(self, path: Path) -> ModelInfo:
        """Recognise no file.  Raises NotThisFormat."""
        raise NotThisFormat(f"{path.name}: Apple's model has no files")

    def built_in(self) -> tuple[ModelInfo, ...]:
        """Return the model that needs no files."""
        return (apple_info(),)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return zero bytes: the system keeps the model in memory for all applications."""
        context = min(options.context_tokens or info.context_length, info.context_length)
        return MemoryEstimate(0, 0, 0, context, context)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Open the model; the system loads it with the first request."""
        availability = self.availability()
        if not availability.is_available:
            raise BackendUnavailable(f"Apple's model cannot run: {availability.reason}.")
        model = import_sdk().SystemLanguageModel()
        context = min(self.estimate(info, options).context_tokens, int(model.context_size))
        return AppleEngine(info, model, options, context_tokens=context)


def apple_info() -> ModelInfo:
    """Return the description of Apple's model; the system does not publish its size."""
    return ModelInfo(
        format=AppleFoundationBackend.name,
        name="apple-foundation-model",
        architecture="apple-foundation",
        quantization="",
        files=(),
        size_bytes=0,
        parameters=0,
        context_length=CONTEXT_TOKENS,
        capabilities=frozenset({Capability.CHAT, Capability.TOOLS}),
        license="Apple",
    )


def system_problem(system: str, release: int) -> str:
    """Return why the model cannot run on this system, empty if it can.

    `release` is the major version of macOS; 0 if it is not known.
    """
    if system != "darwin":
        return "Apple's model needs macOS 26 or later"
    if release < _OLDEST_MACOS:
        return f"Apple's model needs macOS 26 or later; this is {release or 'unknown'}"
    return ""


def _model_problem() -> str:
    """Return why the system says that the model is unavailable, empty if it is; blocks shortly."""
    if importlib.util.find_spec("apple_fm_sdk") is None:
        return "apple-fm-sdk is not installed; install Xcode 26, then run scripts/setup"
    try:
        is_available, reason = import_sdk().SystemLanguageModel().is_available()
    except Exception as error:
        # No exception of the SDK may affect the other formats.
        return f"asking the system failed ({str(error)[:200]})"
    if is_available:
        return ""
    return _REASONS.get(getattr(reason, "name", ""), "the system gives no reason")
