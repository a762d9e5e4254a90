"""Keeps the user's limits for downloads in a file of the home folder."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends.small_json import read_object
from catalog.jobs import Hours, JobLimits, parse_hours
from core.errors import BrokenModel, ImpetusError, RequestError
from core.files import why, write_atomically

logger = logging.getLogger(__name__)

MAX_PARALLEL = 8
_MOST_BYTES = 2**53


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """How many downloads run at once, their bytes in a second together (0: no limit), and when.

    `hours` are written as 22:30-06:00, empty for the whole day.
    """

    parallel: int = 1
    bytes_per_s: int = 0
    hours: str = ""

    def check(self) -> None:
        """Raise RequestError for what is not a limit."""
        if not 1 <= self.parallel <= MAX_PARALLEL:
            raise RequestError(f"parallel: from 1 to {MAX_PARALLEL}.", param="parallel")
        if not 0 <= self.bytes_per_s <= _MOST_BYTES:
            raise RequestError("bytes_per_s: 0 for no limit, or more.", param="bytes_per_s")
        if self.hours:
            parse_hours(self.hours)

    def applied_to(self, limits: JobLimits, kind: str) -> JobLimits:
        """Return `limits` with these for jobs of `kind`."""
        hours = {kind: parse_hours(self.hours)} if self.hours else dict[str, Hours]()
        return replace(limits, parallel={kind: self.parallel}, hours=hours)


class LimitsFile:
    """The stored limits; all methods block for a moment."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> DownloadLimits:
        """Return the limits; the usual ones if nothing valid is stored."""
        try:
            stored: dict[str, Any] = dict(read_object(self._path))
            found = DownloadLimits(**stored)
            found.check()
        except (BrokenModel, RequestError, TypeError, ValueError, AttributeError) as problem:
            logger.warning("%s is not used: %s", self._path, problem)
            return DownloadLimits()
        return found

    def write(self, limits: DownloadLimits) -> None:
        """Store the limits.  Raises ImpetusError."""
        try:
            write_atomically(self._path, json.dumps(asdict(limits)).encode())
        except OSError as problem:
            raise ImpetusError(
                f"The limits could not be stored in {self._path.parent} ({why(problem)}); make the "
                "folder writable."
            ) from problem
