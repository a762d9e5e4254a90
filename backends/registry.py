"""Finds every backend, the built-in formats and those of installed plug-ins, once per process."""

import functools
import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType

import pluggy

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from core.errors import BackendUnavailable, RequestError, Unavailable
from core.plugins import GROUP, describe_failure, hookimpl, plugin_manager, probe

logger = logging.getLogger(__name__)

_BUILT_IN = "built-in formats"
_NOT_USED = "plug-in %s is not used: %s"
_LONGEST_REASON = 500
_BUILT_IN_CLASSES = {
    "gguf": ("backends.gguf.backend", "GgufBackend"),
    "mlx": ("backends.mlx.backend", "MlxBackend"),
    "safetensors": ("backends.safetensors", "SafetensorsBackend"),
    "pytorch": ("backends.pytorch.backend", "PytorchBackend"),
    "onnx": ("backends.onnx.backend", "OnnxBackend"),
    "coreml": ("backends.coreml.backend", "CoremlBackend"),
    "apple-foundation": ("backends.apple.backend", "AppleFoundationBackend"),
    "echo": ("backends.echo", "EchoBackend"),
}
_lock = threading.Lock()


class BuiltInFormats:
    """Registers the formats of this package, through the same hook as a plug-in.

    `find_backend` returns a registered backend by name, for formats that run on another one.
    """

    def __init__(self, find_backend: Callable[[str], Backend | None]) -> None:
        self._find_backend = find_backend

    @hookimpl
    def register_backends(self, register: Callable[[Backend], None]) -> None:
        """Register the built-in formats; one whose module fails is registered as unavailable."""
        for name, (module, kind) in _BUILT_IN_CLASSES.items():
            try:
                made = getattr(importlib.import_module(module), kind)
                register(made(self._find_backend) if name == "safetensors" else made())
            except Exception as error:
                reason = f"its code could not be loaded: {type(error).__name__}: {error}"
                logger.exception("the format %s cannot be used: %s", name, reason)
                register(FailedBackend(name, reason[:_LONGEST_REASON]))


class FailedBackend(Backend):
    """Takes the place of a format whose code could not be loaded: the other formats are served."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name  # type: ignore[misc]
        self._reason = reason

    def availability(self) -> Availability:
        """Return the reason."""
        return Availability(False, self._reason)

    def identify(self, path: Path) -> ModelInfo:
        """Raise Unavailable: nobody can tell whether the file is of this format."""
        del path
        raise Unavailable(f"the format {self.name} cannot be asked, {self._reason}", param="model")

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Raise BackendUnavailable with the reason."""
        del options
        raise BackendUnavailable(f"{info.name} cannot run here: {self._reason}", param="model")

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Raise BackendUnavailable with the reason."""
        del options
        raise BackendUnavailable(f"{info.name} cannot run here: {self._reason}", param="model")


def load_backends() -> Mapping[str, Backend]:
    """Return every backend by name, found at the first call.

    A plug-in that fails, ends its process or hangs is logged and left out.  With plug-ins
    installed the first call blocks while each is imported in a child process, 30 s at most.
    """
    with _lock:
        return _discover()


@functools.cache
def _discover() -> Mapping[str, Backend]:
    found: dict[str, Backend] = {}

    def register(backend: Backend) -> None:
        if backend.name in found:
            logger.error("format %s is registered twice; the first is kept", backend.name)
            return
        found[backend.name] = backend

    manager = plugin_manager()
    manager.register(BuiltInFormats(found.get), name=_BUILT_IN)
    _import_plugins(manager)
    for implementation in manager.hook.register_backends.get_hookimpls():
        name = implementation.plugin_name
        # A plug-in may raise SystemExit; with the built-in formats it is the user's Ctrl-C.
        caught = Exception if name == _BUILT_IN else BaseException
        try:
            implementation.function(register=register)
        except caught as error:
            logger.exception(_NOT_USED, name, describe_failure(error))
    return MappingProxyType(found)


def _import_plugins(manager: pluggy.PluginManager) -> None:
    """Import and register each installed plug-in that a child process could import."""
    entries = tuple(entry_points(group=GROUP))
    for entry, reason in zip(entries, probe(entries), strict=True):
        if reason:
            logger.error(_NOT_USED, entry.name, reason)
            continue
        try:
            manager.register(entry.load(), name=entry.name)
        except BaseException as error:
            logger.exception(_NOT_USED, entry.name, describe_failure(error))


def backends_for(names: list[str]) -> Mapping[str, Backend]:
    """Return the backends of these formats.  Raises RequestError naming an unknown one."""
    known = load_backends()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RequestError(
            f"Unknown format {', '.join(unknown)}; the formats are {', '.join(sorted(known))}.",
            param="formats",
        )
    return {name: known[name] for name in names}
