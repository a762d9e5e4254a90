"""Models that fail: how long one is left alone, and when it is put away.  Pure, `now` is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

DEATHS_TO_QUARANTINE = 3
DEATH_WINDOW_S = 300.0
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """What went wrong with one model; times are monotonic seconds.

    `files` is the fingerprint of what failed: other files are another model.  `deaths` are the
    ends of processes that the model used, by the process' name.  `failures` are loads that failed
    in a row, the last at `failed_at`.
    """

    files: str
    deaths: Mapping[str, float] = field(default_factory=dict)
    failures: int = 0
    failed_at: float = 0.0
    reason: str = ""
    is_quarantined: bool = False

    @property
    def pause_s(self) -> float:
        """How long no load is tried after the last failure: twice as long after each."""
        return min(FIRST_PAUSE_S * 2.0 ** (self.failures - 1), LONGEST_PAUSE_S)


def load_failed(record: FaultRecord, reason: str, now: float) -> FaultRecord:
    """Return the record after another load failed."""
    return replace(record, failures=record.failures + 1, failed_at=now, reason=reason)


def process_died(record: FaultRecord, process: str, reason: str, now: float) -> FaultRecord:
    """Return the record after a process died that the model used; each process counts once.

    DEATHS_TO_QUARANTINE of them within DEATH_WINDOW_S put the model into quarantine.
    """
    deaths = {name: at for name, at in record.deaths.items() if now - at < DEATH_WINDOW_S}
    deaths.setdefault(process, now)
    is_looping = len(deaths) >= DEATHS_TO_QUARANTINE
    return replace(
        record, deaths=deaths, reason=reason, is_quarantined=record.is_quarantined or is_looping
    )


def loaded(record: FaultRecord) -> FaultRecord:
    """Return the record after a load that worked; deaths are not forgiven by that."""
    return replace(record, failures=0)


def wait_s(record: FaultRecord, now: float) -> float:
    """Return for how long no load is to be tried; 0.0 where it may be now."""
    if not record.failures:
        return 0.0
    return max(0.0, record.failed_at + record.pause_s - now)
