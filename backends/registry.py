"""All backends by name: the built-in formats and those of installed plug-ins."""

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

from backends.base import Backend
from core.errors import RequestError
from core.plugins import GROUP, hookimpl, plugin_manager

logger = logging.getLogger(__name__)


class BuiltInFormats:
    """Registers the formats of this package, through the same hook as a plug-in."""

    @hookimpl
    def register_backends(self, register: Callable[[Backend], None]) -> None:
        """Register the built-in formats."""
        from backends.apple.backend import AppleFoundationBackend
        from backends.coreml.backend import CoremlBackend
        from backends.echo import EchoBackend
        from backends.gguf.backend import GgufBackend
        from backends.mlx.backend import MlxBackend
        from backends.onnx.backend import OnnxBackend
        from backends.pytorch.backend import PytorchBackend
        from backends.safetensors import SafetensorsBackend

        register(GgufBackend())
        register(MlxBackend())
        register(SafetensorsBackend())
        register(PytorchBackend())
        register(OnnxBackend())
        register(CoremlBackend())
        register(AppleFoundationBackend())
        register(EchoBackend())


def load_backends() -> Mapping[str, Backend]:
    """Return every backend by name.  A plug-in that fails is logged and left out."""
    manager = plugin_manager()
    manager.register(BuiltInFormats())
    for entry in entry_points(group=GROUP):
        try:
            manager.register(entry.load(), name=entry.name)
        except Exception:
            logger.exception("plug-in %s cannot be loaded", entry.name)
    found: dict[str, Backend] = {}

    def register(backend: Backend) -> None:
        if backend.name in found:
            logger.error("format %s is registered twice; the first is kept", backend.name)
            return
        found[backend.name] = backend

    for implementation in manager.hook.register_backends.get_hookimpls():
        try:
            implementation.function(register=register)
        except Exception:
            logger.exception("plug-in %s failed", implementation.plugin_name)
    return found


def backends_for(names: list[str]) -> Mapping[str, Backend]:
    """Return the backends of these formats.  Raises RequestError naming an unknown one."""
    known = load_backends()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RequestError(
            f"Unknown format {', '.join(unknown)}; known are {', '.join(sorted(known))}.",
            param="formats",
        )
    return {name: known[name] for name in names}
