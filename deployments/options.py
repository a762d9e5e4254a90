"""What the settings mean for engines on this machine."""

from backends.base import EngineOptions
from backends.engine.threads import performance_cores
from backends.registry import backends_for
from core.errors import RequestError
from core.settings import Settings
from core.units import format_bytes
from scheduler.sensors.machine import gpu_memory_bytes, machine_memory_bytes, memory_budget_bytes


def engine_options(settings: Settings, budget_bytes: int) -> EngineOptions:
    """Return how engines are opened under these settings."""
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
    """Return what all models may use together, beside prefixes of models that are unloaded."""
    if settings.memory_budget is not None:
        return settings.memory_budget
    found = machine_budget_bytes()
    return max(found - settings.prefix_ram, found // 2)


def machine_budget_bytes() -> int:
    """Return what models may use together on this machine, where no setting says."""
    return memory_budget_bytes(machine_memory_bytes(), gpu_memory_bytes())


def check_settings(settings: Settings) -> None:
    """Raise RequestError naming a setting that this machine or program cannot honour."""
    backends_for(settings.formats)
    asked, total = settings.memory_budget, machine_memory_bytes()
    if asked is not None and asked > total:
        raise RequestError(
            f"memory_budget: {format_bytes(asked)} are more than the {format_bytes(total)} that "
            "this machine has.",
            param="memory_budget",
        )
