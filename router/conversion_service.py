"""Conversions as the API shows them, and the Protocol that the routes reach them through."""

from dataclasses import dataclass
from typing import Protocol

from router.job_service import Answer, JobDetail


class ForecastView(Answer):
    """What a conversion will take; `is_measured`: `seconds` are from earlier ones on this machine.

    `result_bytes` is what the result takes, `disk_bytes` the most that it and the files on the way
    to it take at once, `memory_bytes` the most memory.
    """

    seconds: float
    is_measured: bool
    result_bytes: int
    disk_bytes: int
    memory_bytes: int


class ConversionChoice(Answer):
    """A quantization of a target format, with its forecast."""

    quantization: str
    forecast: ForecastView


class ConversionTarget(Answer):
    """A target format; `reason` says why a model cannot be converted to it, else it is empty.

    `choices` has the default first.  `group_sizes` is empty for formats without that choice.
    `runs_here` tells whether results can run on this machine, `runs_here_reason` why not.
    """

    format: str
    reason: str
    runs_here: bool
    runs_here_reason: str
    choices: tuple[ConversionChoice, ...]
    group_sizes: tuple[int, ...]


class ConversionTargets(Answer):
    """What the model `model` can be converted to.

    `used_bytes` is what all converted models take now, `limit_bytes` what they may take together,
    `free_bytes` what is free on their disk.
    """

    model: str
    targets: tuple[ConversionTarget, ...]
    used_bytes: int
    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ConversionWish:
    """A conversion as a user asks for it; what is empty or None is chosen."""

    model: str
    format: str
    quantization: str = ""
    group_size: int | None = None
    name: str = ""


class Conversions(Protocol):
    """Conversions, each of which is a job.  Both raise Unavailable without an answer."""

    async def conversion_targets(self, model: str) -> ConversionTargets:
        """Return what a model can be converted to.  Raises ModelNotFound, BrokenModel."""
        ...

    async def convert(self, wish: ConversionWish) -> JobDetail:
        """Return the job of a conversion, a new one or that which does the same already.

        Raises ModelNotFound, RequestError for what is not possible, with the reason.
        """
        ...
