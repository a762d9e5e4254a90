"""Where the faults of models outlive the scheduler's process, but not the server."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from scheduler.faults import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the file holds; `records` by model id."""

    session: str
    records: Mapping[str, Record]


_KEPT = TypeAdapter(_Kept)


class FaultFile:
    """Keeps the records of one session, replaced as a whole; those of another are not read.

    A session does not outlive the system's start, so that its monotonic times stay true.
    """

    def __init__(self, path: Path, session: str) -> None:
        self._path = path
        self._session = session

    def read(self) -> dict[str, Record]:
        """Return what this session kept, by model id; nothing where that cannot be read."""
        try:
            kept = _KEPT.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as problem:
            logger.warning("what is known of failing models cannot be read: %s", problem)
            return {}
        return dict(kept.records) if kept.session == self._session else {}

    def write(self, records: Mapping[str, Record]) -> None:
        """Replace what is kept; blocks for a small file.  A failure is logged."""
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            scratch.write_bytes(_KEPT.dump_json(_Kept(self._session, records)))
            scratch.replace(self._path)
        except OSError as problem:
            logger.warning("what is known of failing models cannot be kept: %s", problem)
            scratch.unlink(missing_ok=True)
