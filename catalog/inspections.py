"""Remembers files that are no models, and files that could not be inspected yet."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["unknown", "uninspected"]

VERDICTS: tuple[Verdict, ...] = ("unknown", "uninspected")
_FIRST_RETRY_S = 60.0
_LONGEST_RETRY_S = 3600.0
# A model whose files did not change for as long is complete, or will stay as it is.
QUIET_S = 3.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an inspection of the file at `path` gave, apart from a model or a refusal.

    It holds while `signature` stays the same.  "unknown": no format recognizes the file.
    "uninspected": it failed `attempts` times for `reason`, which says nothing about the content;
    it is tried again at `retry_at`, in Unix seconds.  With no attempts it is still being written.
    """

    path: str
    signature: str
    verdict: Verdict
    reason: str = ""
    attempts: int = 0
    retry_at: float = 0.0

    def is_due(self, now: float) -> bool:
        """Whether the file has to be inspected although it did not change."""
        if self.verdict == "unknown":
            return False
        # A clock that was set back must not postpone it for years.
        return not 0 < self.retry_at - now <= _LONGEST_RETRY_S


def failed_again(
    path: str, signature: str, reason: str, before: Inspection | None, now: float
) -> Inspection:
    """Return the note of one more failed inspection; the delay doubles up to an hour."""
    attempts = 1
    if before is not None and before.verdict == "uninspected" and before.signature == signature:
        attempts = before.attempts + 1
    delay_s = min(_FIRST_RETRY_S * 2.0 ** min(attempts - 1, 30), _LONGEST_RETRY_S)
    return Inspection(path, signature, "uninspected", reason, attempts, now + delay_s)


def arriving(
    path: str, signature: str, reason: str, now: float, look_s: float = QUIET_S
) -> Inspection:
    """Return the note of a file that is still being written; it is looked at after `look_s`."""
    return Inspection(path, signature, "uninspected", reason, 0, now + look_s)


def is_arriving(inspection: Inspection) -> bool:
    """Whether the file was not inspected because it was still being written."""
    return inspection.verdict == "uninspected" and not inspection.attempts


def read_inspections(
    connection: sqlite3.Connection, verdicts: Sequence[Verdict] = VERDICTS
) -> dict[str, Inspection]:
    """Return the notes with these verdicts by path."""
    rows = connection.execute(
        "SELECT path, signature, verdict, reason, attempts, retry_at FROM inspections "
        f"WHERE verdict IN ({', '.join('?' * len(verdicts))})",
        tuple(verdicts),
    )
    return {row[0]: Inspection(*row) for row in rows}


def write_inspections(
    connection: sqlite3.Connection, noted: Sequence[Inspection], removed: Sequence[str]
) -> None:
    """Insert or replace notes, and delete those of the paths `removed`."""
    connection.executemany("DELETE FROM inspections WHERE path = ?", [(one,) for one in removed])
    connection.executemany(
        "INSERT OR REPLACE INTO inspections VALUES (?, ?, ?, ?, ?, ?)",
        [
            (one.path, one.signature, one.verdict, one.reason, one.attempts, one.retry_at)
            for one in noted
        ],
    )
