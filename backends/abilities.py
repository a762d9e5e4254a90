"""Optional abilities of backends and engines: token counting, KV types, preloading a runtime."""

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from backends.base import Backend, Engine, EngineOptions, ModelInfo
from core.errors import UnsupportedCapability, UnsupportedParameter
from core.types import Prompt

# Every name that some format knows; the wire refuses all others.
KV_TYPES = ("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@runtime_checkable
class TokenCounting(Protocol):
    """An engine that knows how long a prompt is without running it."""

    async def count_tokens(self, prompt: Prompt) -> int:
        """Return the prompt's tokens, the chat template's and the tools' included.

        Raises what `Engine.generate` raises for a prompt, but not for its length.
        """
        ...


async def count_tokens(engine: Engine, prompt: Prompt) -> int:
    """Return the prompt's tokens; raises UnsupportedCapability for an engine that cannot tell."""
    if not isinstance(engine, TokenCounting):
        raise UnsupportedCapability(
            f"The model {engine.info.name} ({engine.info.format}) cannot count tokens.",
            param="model",
        )
    return await engine.count_tokens(prompt)


@runtime_checkable
class Measured(Protocol):
    """A backend with a runtime to import; `reserves_kv`: an open model holds all its KV cells."""

    reserves_kv: ClassVar[bool]

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import the runtime that `info` needs, which is no model's memory.

        Blocks; call it on a loader thread.
        """
        ...


@runtime_checkable
class KvTyped(Protocol):
    """A backend with a choice of KV types."""

    def kv_types(self, info: ModelInfo) -> Mapping[str, float]:
        """Return the types that this model's cells can have, with their bytes per element."""
        ...


def check_kv_type(backend: Backend | None, info: ModelInfo, kv_type: str) -> None:
    """Raise UnsupportedParameter where the model cannot keep keys and values as `kv_type`."""
    known: Mapping[str, float] = {}
    if isinstance(backend, KvTyped):
        known = backend.kv_types(info)
    if kv_type in known:
        return
    able = f"it can use {', '.join(known)}" if known else "there is no choice for it"
    raise UnsupportedParameter(
        f"kv_type: {info.name} ({info.format}) cannot keep keys and values as {kv_type}; {able}.",
        param="kv_type",
    )
