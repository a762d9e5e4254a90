"""Where the faults of models outlive the scheduler's process, but not the server."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from scheduler.faults import Record

logger = logging.getLogger(__name__)

_NAMES = frozenset(field.name for field in fields(Record))


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
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["session"] != self._session:
                return {}
            return {
                model_id: Record(**{name: value for name, value in one.items() if name in _NAMES})
                for model_id, one in kept["records"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
            logger.warning("what is known of failing models cannot be read: %r", problem)
            return {}

    def write(self, records: Mapping[str, Record]) -> None:
        """Replace what is kept; blocks for a small file.  A failure is logged."""
        kept = {name: asdict(record) for name, record in records.items()}
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            scratch.write_text(
                json.dumps({"session": self._session, "records": kept}), encoding="utf-8"
            )
            scratch.replace(self._path)
        except OSError as problem:
            logger.warning("what is known of failing models cannot be kept: %r", problem)
            scratch.unlink(missing_ok=True)
