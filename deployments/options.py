"""Derives engine options and the memory budget from settings and this machine."""

from backends.base import EngineOptions
from backends.engine.threads import performance_cores
from backends.registry import backends_for
from core.errors import RequestError
from core.settings import Settings
from core.units import format_bytes
from scheduler.sensors.machine import gpu_memory_bytes, machine_memory_bytes, memory_budget_bytes


def engine_options(settings: Settings, budget_bytes: int) -> EngineOptions:
    """Return the engine options for these settings."""
    return EngineOptions(
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
        threads=settings.threads or performance_cores(),
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        context_tokens=settings.context_length,
        memory_limit_bytes=budget_bytes,
        stable_prompts=settings.stable_prompts,
    )


def budget_bytes(settings: Settings) -> int:
    """Return the memory budget for all models, without the RAM for prefixes of unloaded models."""
    if settings.memory_budget is not None:
        return settings.memory_budget
    found = machine_budget_bytes()
    return max(found - settings.prefix_ram, found // 2)


def machine_budget_bytes() -> int:
    """Return the default memory budget for all models on this machine."""
    return memory_budget_bytes(machine_memory_bytes(), gpu_memory_bytes())


def check_settings(settings: Settings) -> None:
    """Raise RequestError naming a setting that does not work on this machine."""
    backends_for(settings.formats)
    asked, total = settings.memory_budget, machine_memory_bytes()
    if asked is not None and asked > total:
        raise RequestError(
            f"memory_budget is {format_bytes(asked)}, but this machine has {format_bytes(total)}. "
            "Lower it, or leave it unset.",
            param="memory_budget",
        )
