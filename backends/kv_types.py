"""What a format can keep keys and values as, where it leaves the choice to the user."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from backends.base import Backend, ModelInfo
from core.errors import UnsupportedParameter

# Every name that some format knows; the wire refuses all others.
KV_TYPES = ("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


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
