"""Sources of events that do what a test says."""

import json
from typing import Any

from router.events.hub import KnownState, Publish
from router.events.messages import DecisionEvent, Event, JobEvent, ModelEvent, ModelSummary
from router.job_service import JobView


class FakeSources:
    """Remembers whether it is followed; `known_now` is what it answers with."""

    def __init__(self) -> None:
        self.publish: Publish | None = None
        self.known_now = KnownState()
        self.starts = 0
        self.news: list[Event] = []

    def start(self, publish: Publish) -> None:
        self.starts += 1
        self.publish = publish

    def stop(self) -> None:
        self.publish = None

    async def refresh(self) -> None:
        """Publish what the test left here, as a source that had not told it yet."""
        assert self.publish is not None
        for event in self.news:
            self.publish(event)
        self.news = []

    def known(self) -> KnownState:
        return self.known_now


def model_event(model_id: str, state: Any = "resident", change: Any = "loaded") -> ModelEvent:
    model = ModelSummary(id=model_id, name=model_id, format="gguf", size_bytes=1, state=state)
    return ModelEvent(at=1.0, change=change, model=model)


def decision(reason: str) -> DecisionEvent:
    return DecisionEvent(at=1.0, event="test", action="act", reason=reason)


def job_view(job_id: str = "j1", done: int = 0, **changes: Any) -> JobView:
    fields: dict[str, Any] = {
        "id": job_id,
        "kind": "download",
        "title": "a model",
        "state": "running",
        "reason": "",
        "code": "",
        "created_at": 1.0,
        "started_at": 1.0,
        "ended_at": None,
        "retry_at": None,
        "done_bytes": done,
        "total_bytes": 100,
    }
    return JobView(**{**fields, **changes})


def progress(job_id: str, done: int) -> JobEvent:
    return JobEvent(at=1.0, type="job.progress", job=job_view(job_id, done))


def parsed(text: str) -> list[tuple[str, str, Any]]:
    """Return (id, type, data) of each event of a stream's text; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if "data" in fields:
            data = json.loads(fields["data"])
            assert data["type"] == fields["event"]
            found.append((fields["id"], fields["event"], data))
    return found
