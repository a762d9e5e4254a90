"""Derives engine options and the memory budget from settings and this machine."""

import os
import tempfile

from backends.base import EngineOptions
from backends.engine.threads import performance_cores
from backends.registry import backends_for
from core.errors import ImpetusError, RequestError
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


def check_home(settings: Settings) -> None:
    """Create the data folder.  Raises ImpetusError if nothing can be written there."""
    home = settings.home
    try:
        for folder in (home, home / "logs", home / "keys"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
    except OSError as problem:
        is_file = isinstance(problem, FileExistsError | NotADirectoryError)
        cause = "a part of the path is a file" if is_file else os.strerror(problem.errno or 0)
        raise ImpetusError(
            f"The data folder {home} cannot be used: {cause}. Set IMPETUS_HOME to a folder that "
            "you can write to."
        ) from problem
