"""Finds every backend, the built-in formats and those of installed plug-ins, once per process."""

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

import pluggy

from backends.base import Backend
from core.errors import RequestError
from core.plugins import GROUP, describe_failure, hookimpl, plugin_manager, probe

logger = logging.getLogger(__name__)

_BUILT_IN = "built-in formats"
_NOT_USED = "plug-in %s is not used: %s"
_lock = threading.Lock()


class BuiltInFormats:
    """Registers the formats of this package, through the same hook as a plug-in.

    `find_backend` returns a registered backend by name, for formats that run on another one.
    """

    def __init__(self, find_backend: Callable[[str], Backend | None]) -> None:
        self._find_backend = find_backend

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
        register(SafetensorsBackend(self._find_backend))
        register(PytorchBackend())
        register(OnnxBackend())
        register(CoremlBackend())
        register(AppleFoundationBackend())
        register(EchoBackend())


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
