"""What the settings mean for engines on this machine."""

from backends.base import EngineOptions
from backends.threads import performance_cores
from core.settings import Settings
from scheduler.sensors import machine_memory_bytes, memory_budget_bytes


def engine_options(settings: Settings, budget_bytes: int) -> EngineOptions:
    """Return how engines are opened under these settings."""
    return EngineOptions(
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
        threads=settings.threads or performance_cores(),
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        context_tokens=settings.context_length,
        memory_limit_bytes=budget_bytes,
    )


def budget_bytes(settings: Settings) -> int:
    """Return what all models may use together."""
    return settings.memory_budget or memory_budget_bytes(machine_memory_bytes())
