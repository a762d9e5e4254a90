"""From what was estimated to how an engine is opened."""

from dataclasses import replace

from backends.base import EngineOptions, MemoryEstimate


def as_granted(options: EngineOptions, granted: MemoryEstimate) -> EngineOptions:
    """Return `options` with the context and cache that the estimate found room for."""
    return replace(
        options,
        context_tokens=granted.context_tokens,
        kv_tokens=granted.kv_tokens,
        prefix_bytes=granted.prefix_bytes,
        warm_tokens=granted.warm_tokens,
    )
