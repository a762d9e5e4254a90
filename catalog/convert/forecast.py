"""Forecasts a conversion: its time from what earlier ones took, its disk space and memory."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from backends.small_json import read_object
from catalog.convert.disk import needed_disk_bytes, result_bytes
from catalog.convert.graph import plan
from catalog.convert.memory import needed_bytes
from core.errors import BrokenModel
from core.files import write_atomically
from core.units import MIB

logger = logging.getLogger(__name__)

# Before the first conversion of a kind on this machine: reading, computing and writing.
DEFAULT_BYTES_PER_S = 40 * MIB
# Python and the libraries of a step start within this.
_START_S = 10.0
_KEPT = 8
# A measurement tells nothing about a model that is so many times larger or smaller.
_COMPARABLE = 30.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A conversion on this machine: the source's bytes and the seconds that it ran."""

    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ConversionForecast:
    """What a conversion will take; `is_measured` tells whether `seconds` are from this machine.

    `result_bytes` is what the result takes, `disk_bytes` the most that it and the files on the way
    take at once, `memory_bytes` the most memory.
    """

    seconds: float
    is_measured: bool
    result_bytes: int
    disk_bytes: int
    memory_bytes: int


def forecast(
    source: ModelInfo,
    target_format: str,
    quantization: str,
    group_size: int,
    measured: Mapping[str, Sequence[Measured]],
) -> ConversionForecast:
    """Return the forecast of a conversion that is possible; `measured` is by `measured_kind`."""
    route = plan(source.format, target_format, quantization)
    seconds, is_measured = _seconds(
        source.size_bytes, measured.get(measured_kind(source.format, target_format), ())
    )
    return ConversionForecast(
        seconds=round(seconds, 1),
        is_measured=is_measured,
        result_bytes=result_bytes(source, quantization, group_size),
        disk_bytes=needed_disk_bytes(source, quantization, route),
        memory_bytes=needed_bytes(source, route),
    )


def measured_kind(source_format: str, target_format: str) -> str:
    """Return the kind of conversions whose speeds are compared."""
    return f"{source_format}>{target_format}"


def _seconds(size_bytes: int, measured: Sequence[Measured]) -> tuple[float, bool]:
    """Return the seconds by the measurement of the model nearest in size, and whether any was."""
    best = min(measured, key=lambda one: _distance(one, size_bytes), default=None)
    if best is None or _distance(best, size_bytes) > math.log(_COMPARABLE):
        return _START_S + size_bytes / DEFAULT_BYTES_PER_S, False
    return best.seconds * size_bytes / best.size_bytes, True


def _distance(one: Measured, size_bytes: int) -> float:
    return abs(math.log(max(size_bytes, 1) / one.size_bytes))


class SpeedFile:
    """The last conversions that this machine ran, by kind; all methods block for a moment."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, tuple[Measured, ...]]:
        """Return what was measured; nothing if the file cannot be used."""
        try:
            stored: Mapping[str, Any] = read_object(self._path)
            found = {
                kind: tuple(Measured(**one) for one in several) for kind, several in stored.items()
            }
        except (BrokenModel, TypeError, ValueError) as problem:
            logger.warning("%s is not used: %s", self._path, problem)
            return {}
        return {kind: tuple(one for one in each if _is_valid(one)) for kind, each in found.items()}

    def add(self, kind: str, one: Measured) -> None:
        """Store a measurement beside the last ones of its kind; a failure is logged."""
        if not _is_valid(one):
            return
        known = self.read()
        known[kind] = (*known.get(kind, ()), one)[-_KEPT:]
        rows = {name: [asdict(each) for each in several] for name, several in known.items()}
        try:
            write_atomically(self._path, json.dumps(rows).encode())
        except OSError as problem:
            logger.warning("the time of a conversion is not stored: %s", problem)


def _is_valid(one: Measured) -> bool:
    return one.size_bytes > 0 and math.isfinite(one.seconds) and one.seconds > 0
