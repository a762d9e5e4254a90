"""Publishes changes of long jobs: new states at once, progress at most four times a second."""

import time
from typing import Any

from deployments.router.events.polling import PolledSource
from deployments.serve.handles import Handle, direct
from router.events.hub import Publish
from router.events.messages import JobEvent, JobOrderEvent, JobRemovedEvent
from router.job_service import JobChanges, JobView

# A change while nothing else changes is published at once, the next one a quarter second later.
PAUSE_S = 0.25
_ORDER = "job order"
_PROGRESS = {"done_bytes", "total_bytes", "bytes_per_s", "remaining_s", "stalled_s"}


class JobEvents(PolledSource[JobChanges]):
    """All jobs in the order of the queue; see `PolledSource`."""

    def __init__(self, jobs: Handle, pause_s: float = PAUSE_S) -> None:
        super().__init__("The process of long jobs", pause_s)
        self._jobs = direct(jobs)
        self._views: dict[str, JobView] = {}

    def known(self) -> list[JobView]:
        """Return all jobs."""
        return list(self._views.values())

    def _ask(self, version: int, limit_s: float) -> Any:
        return self._jobs.job_changes.remote(version, limit_s)

    def _version_of(self, answer: JobChanges) -> int:
        return answer.version

    def _apply(self, answer: JobChanges, publish: Publish | None) -> None:
        old, new = self._views, {one.id: one for one in answer.jobs}
        ids = tuple(old) if answer.ids is None else answer.ids
        merged = new if answer.is_whole else {**old, **new}
        self._views = {job_id: merged[job_id] for job_id in ids if job_id in merged}
        if publish is None:
            return
        now = time.time()
        for job_id in old.keys() - self._views.keys():
            publish(JobRemovedEvent(at=now, job_id=job_id), ends=job_id)
        for view in answer.jobs:
            _publish_change(publish, old.get(view.id), view, now)
        stayed = [job_id for job_id in self._views if job_id in old]
        if stayed != [job_id for job_id in old if job_id in self._views]:
            publish(JobOrderEvent(at=now, job_ids=tuple(self._views)), subject=_ORDER)

    def _forget(self) -> None:
        self._views = {}


def _publish_change(publish: Publish, old: JobView | None, new: JobView, now: float) -> None:
    if old == new:
        return
    # What a running job says of itself may change as often as its bytes.
    passing = {*_PROGRESS, *(("reason",) if new.state == "running" else ())}
    if old is None:
        publish(JobEvent(at=now, type="job.added", job=new))
    elif old.model_dump(exclude=passing) == new.model_dump(exclude=passing):
        publish(JobEvent(at=now, type="job.progress", job=new), subject=new.id)
    else:
        publish(JobEvent(at=now, type="job.changed", job=new), ends=new.id)
