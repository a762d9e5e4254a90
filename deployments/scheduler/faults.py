"""Tracks models that fail to load or crash: back-off, quarantine, and a file that keeps them."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from core.errors import ImpetusError, ModelFailed, ModelQuarantined
from core.files import why, write_atomically
from deployments.messages import Fault
from scheduler.faults import (
    DEATH_WINDOW_S,
    DEATHS_TO_QUARANTINE,
    FaultRecord,
    load_failed,
    loaded,
    process_died,
    wait_s,
    without_deaths,
)

logger = logging.getLogger(__name__)

_LONGEST_REASON = 800


@dataclass(frozen=True, slots=True)
class _Kept:
    """Content of the file; `records` by model id."""

    session: str
    records: Mapping[str, FaultRecord]


_KEPT = TypeAdapter(_Kept)


class FaultFile:
    """Stores the records of one session; the records of another session are not read.

    A session does not outlive a reboot, so its monotonic times stay valid.
    """

    def __init__(self, path: Path, session: str) -> None:
        self._path = path
        self._session = session

    def read(self) -> dict[str, FaultRecord]:
        """Return this session's records by model id; none if the file cannot be read."""
        try:
            kept = _KEPT.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as problem:
            logger.warning(
                "cannot read the records of failing models, starting without: %s", problem
            )
            return {}
        return dict(kept.records) if kept.session == self._session else {}

    def write(self, records: Mapping[str, FaultRecord]) -> None:
        """Replace the file; blocks for a small file.  A failure is logged."""
        try:
            content = _KEPT.dump_json(_Kept(self._session, records))
            write_atomically(self._path, content, is_durable=False)
        except OSError as problem:
            logger.warning("cannot store the records of failing models: %s", why(problem))


class Faults:
    """Records of failing models by id.  Belongs to one event loop; `file` outlives the process."""

    def __init__(
        self,
        file: FaultFile | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = file
        self._clock = clock
        self._on_change = on_change
        self._records: dict[str, FaultRecord] = {} if file is None else file.read()

    def check(self, model_id: str, files: str) -> None:
        """Raise ModelQuarantined or ModelFailed if the model must not be loaded now."""
        record = self._records.get(model_id)
        if record is None:
            return
        if record.files != files:
            self.clear(model_id)
            return
        retry = f"POST /api/models/{model_id}/load tries again at once."
        if record.is_quarantined:
            raise ModelQuarantined(
                f"{model_id} is in quarantine: {record.reason} {retry}", param="model"
            )
        left_s = wait_s(record, self._clock())
        if left_s > 0:
            raise ModelFailed(
                f"{model_id} could not be loaded: {record.reason} {retry}",
                param="model",
                retry_after_s=math.ceil(left_s),
            )

    def record_failure(self, model_id: str, files: str, problem: BaseException) -> None:
        """Record a failed load."""
        reason = problem.message if isinstance(problem, ImpetusError) else repr(problem)
        record = self._of(model_id, files)
        self._keep(model_id, load_failed(record, reason[:_LONGEST_REASON], self._clock()))

    def record_death(
        self, model_id: str, files: str, process: str, stderr_tail: str, change: str = ""
    ) -> bool:
        """Record a process that died computing the model; True if this quarantines the model.

        `change` says what happened to the model's file since it was inspected, if anything.
        """
        old = self._of(model_id, files)
        # Every request that ran there reports the same death.
        if process in old.deaths:
            return False
        count = len(old.deaths.keys() | {process})
        log = f" Last log lines: {stderr_tail}" if stderr_tail else ""
        changed = f" Before the last death {change}." if change else ""
        reason = (
            f"{min(count, DEATHS_TO_QUARANTINE)} processes died while they computed it within "
            f"{DEATH_WINDOW_S / 60:.0f} minutes.{changed}{log}"
        )
        record = process_died(old, process, reason[:_LONGEST_REASON], self._clock())
        self._keep(model_id, record)
        return record.is_quarantined and not old.is_quarantined

    def confirm_deaths(self, model_ids: Collection[str]) -> None:
        """Withdraw from all other models the deaths that these models are charged with as well."""
        records = self._records
        causes = {name for one in model_ids if one in records for name in records[one].deaths}
        for model_id, record in list(records.items()):
            if model_id not in model_ids and causes & record.deaths.keys():
                self._keep(model_id, without_deaths(record, causes))

    def record_load(self, model_id: str) -> None:
        """Record a successful load."""
        record = self._records.get(model_id)
        if record is not None and record.failures:
            self._keep(model_id, loaded(record))

    def clear(self, model_id: str) -> None:
        """Remove a model's record: an explicit load tries it again."""
        if self._records.pop(model_id, None) is not None:
            self._write()

    def current(self) -> dict[str, Fault]:
        """Return the models that are not loaded now, with the reason, by id."""
        now = self._clock()
        return {
            model_id: Fault(record.is_quarantined, record.reason)
            for model_id, record in self._records.items()
            if record.is_quarantined or wait_s(record, now) > 0
        }

    def expires_in_s(self) -> float | None:
        """Return the seconds until the next back-off ends; None if there is none."""
        now = self._clock()
        waits = [wait_s(record, now) for record in self._records.values()]
        return min((wait for wait in waits if wait > 0), default=None)

    def _keep(self, model_id: str, record: FaultRecord) -> None:
        self._records[model_id] = record
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(self._records)
        self._on_change()

    def _of(self, model_id: str, files: str) -> FaultRecord:
        record = self._records.get(model_id)
        return record if record is not None and record.files == files else FaultRecord(files)
