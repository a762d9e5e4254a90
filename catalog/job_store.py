"""Stores jobs in SQLite, so that they survive the death of their process and of the machine."""

import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catalog.connection import connect, transaction
from catalog.database_errors import cause, is_damage
from catalog.jobs import ENDED, Job
from catalog.migrations import move_aside
from core.errors import CatalogNotWritten, ImpetusError
from core.files import make_private

logger = logging.getLogger(__name__)

# Jobs that are over and are kept for the history.
MAX_ENDED = 500
_VERSION = 1
_TABLE = """
    CREATE TABLE IF NOT EXISTS jobs (
        id TEXT PRIMARY KEY,
        ended REAL,
        job TEXT NOT NULL
    ) STRICT
"""
_NAMES = frozenset(Job.__dataclass_fields__)


class JobStore:
    """The jobs of one server; every call blocks briefly, for several threads of one process.

    A damaged file is moved aside and replaced by an empty one: what downloads have written stays.
    Raises ImpetusError for a file of a newer version or one that cannot be opened, and
    CatalogNotWritten while it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._connection = self._open()
        except sqlite3.Error as problem:
            if not is_damage(problem):
                raise self._unopened(cause(problem)) from problem
            aside = move_aside(path)
            logger.error("the jobs in %s were damaged; the file is now %s", path, aside)
            self._connection = self._open()
        except OSError as problem:
            raise self._unopened(cause(problem)) from problem

    def _unopened(self, reason: str) -> ImpetusError:
        return ImpetusError(
            f"The jobs in {self._path} cannot be opened: {reason}. Check that the folder exists "
            "and that you may write to it."
        )

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        make_private(self._path)
        connection = connect(self._path)
        try:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version > _VERSION:
                raise ImpetusError(
                    f"The jobs in {self._path} were written by a newer version of Impetus "
                    f"({version}, this one knows {_VERSION}); update it, or move the file away."
                )
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("SELECT id, ended, job FROM jobs").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the file; may be called twice."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one transaction."""
        with self._lock:
            try:
                with transaction(self._connection):
                    yield self._connection
            except sqlite3.Error as problem:
                raise CatalogNotWritten(
                    f"The jobs in {self._path} cannot be written: {cause(problem)}.",
                    retry_after_s=10,
                ) from problem

    def jobs(self) -> list[Job]:
        """Return all jobs in the order of the queue; rows that cannot be read are left out."""
        with self._lock:
            try:
                rows = self._connection.execute("SELECT job FROM jobs").fetchall()
            except sqlite3.Error as problem:
                raise CatalogNotWritten(
                    f"The jobs in {self._path} cannot be read: {cause(problem)}.", retry_after_s=10
                ) from problem
        found = [job for (text,) in rows if (job := _read(text)) is not None]
        return sorted(found, key=lambda job: (job.rank, job.created, job.id))

    def save(self, jobs: Iterable[Job]) -> None:
        """Store new and changed jobs, all or none; the oldest that are over are dropped."""
        rows = [
            (job.id, job.ended if job.state in ENDED else None, json.dumps(asdict(job)))
            for job in jobs
        ]
        with self._writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", rows)
            connection.execute(
                "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE ended IS NOT NULL "
                "ORDER BY ended DESC, id LIMIT -1 OFFSET ?)",
                (MAX_ENDED,),
            )

    def remove(self, job_id: str) -> None:
        """Forget a job, if there is one."""
        with self._writing() as connection:
            connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))


def _read(text: str) -> Job | None:
    """Return the job in a row; fields of an older version are filled, unknown ones left out."""
    try:
        values: dict[str, Any] = json.loads(text)
        return Job(**{name: value for name, value in values.items() if name in _NAMES})
    except (ValueError, TypeError, AttributeError):
        logger.error("a stored job cannot be read and is left out")
        return None
