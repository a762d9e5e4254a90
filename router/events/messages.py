"""The events of `GET /api/events` and the answer of `GET /api/state`, as pydantic models.

Every event tells the whole new state of what it is about, so one that is read twice does no harm.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, RootModel

from router.job_service import Answer, JobView

ModelStateName: TypeAlias = Literal[
    "resident",
    "loading",
    "unloading",
    "available",
    "arriving",
    "unavailable",
    "missing",
    "refused",
    "failed",
    "quarantined",
]
ModelChange: TypeAlias = Literal[
    "added",
    "changed",
    "removed",
    "arriving",
    "loading",
    "loaded",
    "unloading",
    "unloaded",
    "failed",
    "quarantined",
]
ResetReason: TypeAlias = Literal["no_id", "unknown_id", "too_old", "source_restarted"]


class ModelSummary(Answer):
    """A model's state; `reason` says why it cannot be used.

    `context_tokens` is the granted context of a loaded model, else the one that a load would get.
    """

    id: str
    name: str
    format: str
    size_bytes: int
    state: ModelStateName
    reason: str = ""
    context_tokens: int = 0
    aliases: tuple[str, ...] = ()


class MemoryHolder(Answer):
    """What holds memory: a loaded model, one that is being loaded or unloaded, or a job."""

    id: str
    kind: Literal["model", "loading", "unloading", "job"]
    size_bytes: int
    is_pinned: bool = False


class MemoryView(Answer):
    """The ledger of model memory, in bytes.

    `free_bytes` are left of the budget, or of what other applications leave if that is less.
    `kept_bytes` are held by processes whose models are gone.
    """

    budget_bytes: int
    used_bytes: int
    free_bytes: int
    kept_bytes: int
    holders: tuple[MemoryHolder, ...]


class StrainView(Answer):
    """What strains the machine; states are nominal, fair, serious, critical or unknown.

    `state` is the worst of `heat`, `memory_pressure` and power, after hysteresis.  `battery` is the
    charge, 0 to 1, of a machine on battery.  `jobs_pause_because` is empty while long jobs may run.
    """

    state: str
    heat: str
    memory_pressure: str
    is_low_power: bool | None
    battery: float | None
    is_throttled: bool
    admits_loads: bool
    jobs_pause_because: str


class RunningRequest(Answer):
    """A request that is being answered; `started_at` is in Unix seconds."""

    request_id: str
    endpoint: str
    model: str
    started_at: float


class _Event(Answer):
    """What all events have: `at` is in Unix seconds."""

    at: float


class ModelEvent(_Event):
    """A model was added, changed, loaded, …; `model` is its state after that.

    `changed` may be a change that is not shown here, such as one of its settings.
    """

    type: Literal["model.state"] = "model.state"
    change: ModelChange
    model: ModelSummary


class JobEvent(_Event):
    """A job is new or changed; of its progress only the last event is kept for replay."""

    type: Literal["job.added", "job.changed", "job.progress"]
    job: JobView


class JobRemovedEvent(_Event):
    """A job is no longer listed."""

    type: Literal["job.removed"] = "job.removed"
    job_id: str


class JobOrderEvent(_Event):
    """The queue has another order: `job_ids` are those of all jobs."""

    type: Literal["job.order"] = "job.order"
    job_ids: tuple[str, ...]


class MemoryEvent(_Event):
    """The ledger of model memory changed; at most one a second."""

    type: Literal["memory"] = "memory"
    memory: MemoryView


class StrainEvent(_Event):
    """Heat, memory pressure or power changed; at most one a second."""

    type: Literal["thermal"] = "thermal"
    thermal: StrainView


class RequestStartedEvent(_Event):
    """A request's model is known and its work begins."""

    type: Literal["request.started"] = "request.started"
    request: RunningRequest


class RequestFinishedEvent(_Event):
    """A request has ended; `first_token_ms` and `tokens_per_s` are null where nothing streamed.

    `duration_ms` counts from the request's headers, `first_token_ms` from the start of the
    generation.  `tokens_per_s` is the speed of generating, without the prompt.
    """

    type: Literal["request.finished"] = "request.finished"
    request: RunningRequest
    status: int
    duration_ms: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_ms: float | None
    tokens_per_s: float | None


class DecisionEvent(_Event):
    """What the scheduler or the router did about an event, and why."""

    type: Literal["decision"] = "decision"
    event: str
    action: str
    reason: str


class ResetEvent(_Event):
    """Events were missed, or may have been: fetch `/api/state` again, and go on reading.

    `no_id`: the stream began without an id.  `unknown_id`: the id is of another run.  `too_old`:
    the events after it are no longer kept, also for a client that reads too slowly.
    `source_restarted`: a part of the state that was missing is there now.
    """

    type: Literal["reset"] = "reset"
    reason: ResetReason


Event: TypeAlias = (
    ModelEvent
    | JobEvent
    | JobRemovedEvent
    | JobOrderEvent
    | MemoryEvent
    | StrainEvent
    | RequestStartedEvent
    | RequestFinishedEvent
    | DecisionEvent
    | ResetEvent
)


class ServerEvent(RootModel[Annotated[Event, Field(discriminator="type")]]):
    """The data of one event of the stream, by its `type`."""


class ServerState(Answer):
    """All that events tell of, as it is after the event `event_id`.

    Open `/api/events?last_event_id=…` with that id to get every later event.  `requests` are those
    of the process that answers; `missing` says by part (models, jobs, machine) why it is outdated
    or missing.  `memory` and `thermal` are null until they are known.
    """

    event_id: str
    at: float
    models: tuple[ModelSummary, ...]
    jobs: tuple[JobView, ...]
    memory: MemoryView | None
    thermal: StrainView | None
    requests: tuple[RunningRequest, ...]
    missing: dict[str, str]
