"""Back-off and quarantine for models that fail to load or crash (pure: `now` is an argument)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

DEATHS_TO_QUARANTINE = 3
DEATH_WINDOW_S = 300.0
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """Failures of one model; times are monotonic seconds.

    `files` is the fingerprint of the files that failed: other files count as another model.
    `deaths` are the times at which processes died with the model, by process name.  `failures`
    counts consecutive failed loads, the last at `failed_at`.
    """

    files: str
    deaths: Mapping[str, float] = field(default_factory=dict)
    failures: int = 0
    failed_at: float = 0.0
    reason: str = ""
    is_quarantined: bool = False

    @property
    def pause_s(self) -> float:
        """Back-off after the last failure, in seconds; doubles with each failure."""
        return min(FIRST_PAUSE_S * 2.0 ** (self.failures - 1), LONGEST_PAUSE_S)


def load_failed(record: FaultRecord, reason: str, now: float) -> FaultRecord:
    """Return the record after another load failed."""
    return replace(record, failures=record.failures + 1, failed_at=now, reason=reason)


def process_died(record: FaultRecord, process: str, reason: str, now: float) -> FaultRecord:
    """Return the record after a process died while it used the model; each process counts once.

    DEATHS_TO_QUARANTINE of them within DEATH_WINDOW_S quarantine the model.
    """
    deaths = {name: at for name, at in record.deaths.items() if now - at < DEATH_WINDOW_S}
    deaths.setdefault(process, now)
    is_looping = len(deaths) >= DEATHS_TO_QUARANTINE
    return replace(
        record, deaths=deaths, reason=reason, is_quarantined=record.is_quarantined or is_looping
    )


def without_deaths(record: FaultRecord, processes: Collection[str]) -> FaultRecord:
    """Return the record without the deaths of processes of which another model was the cause."""
    deaths = {name: at for name, at in record.deaths.items() if name not in processes}
    is_looping = len(deaths) >= DEATHS_TO_QUARANTINE
    return replace(record, deaths=deaths, is_quarantined=record.is_quarantined and is_looping)


def loaded(record: FaultRecord) -> FaultRecord:
    """Return the record after a successful load, which does not reset deaths."""
    return replace(record, failures=0)


def wait_s(record: FaultRecord, now: float) -> float:
    """Return the seconds until a load may be tried again; 0.0 if it may be now."""
    if not record.failures:
        return 0.0
    return max(0.0, record.failed_at + record.pause_s - now)
