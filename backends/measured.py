"""Backends that help to tell what their models take from what the runtime takes."""

from typing import ClassVar, Protocol, runtime_checkable

from backends.base import EngineOptions, ModelInfo


@runtime_checkable
class Measured(Protocol):
    """A backend with a runtime to import; `reserves_kv`: an open model holds all its KV cells."""

    reserves_kv: ClassVar[bool]

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import the runtime that `info` needs, which is no model's memory.

        Blocks; call it on a loader thread.
        """
        ...
