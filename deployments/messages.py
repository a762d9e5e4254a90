"""Messages between the deployments' processes: frozen dataclasses, sent by pickle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from backends.base import EngineOptions, ModelInfo
from catalog.bin import BinEntry as BinEntry
from core.supervision import PartView as PartView
from core.types import Priority
from core.units import format_bytes
from scheduler.preview import LoadPreview as LoadPreview
from scheduler.state import LedgerEntry as LedgerEntry
from scheduler.state import ModelUsage as ModelUsage


@dataclass(frozen=True, slots=True)
class FileMark:
    """Identity of a file when it was opened."""

    path: str
    size_bytes: int
    modified_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Which model a replica loads, and how.

    A step longer than `step_limit_s` counts as hung, and so does a load longer than `load_limit_s`.
    `signatures` are those of the files when they were inspected; see `catalog.changes`.
    """

    model_id: str
    info: ModelInfo
    options: EngineOptions
    step_limit_s: float = 120.0
    load_limit_s: float = 600.0
    signatures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Residency:
    """Address of a loaded model: its replica and node, its context in tokens, its load time.

    `evicted` names the models that made room for it, only in the answer to requests that waited
    for the load.  `runtime` is the library that runs it, empty where the format tells it, and
    `limitations` are the engine's.  A job (`deployments.scheduler.reservations`) has no format.
    """

    model_id: str
    format: str
    replica_id: str
    node_id: str
    context_tokens: int
    load_s: float
    evicted: tuple[str, ...] = ()
    runtime: str = ""
    limitations: tuple[str, ...] = ()

    @property
    def is_job(self) -> bool:
        """Whether this is a job's memory, which takes no requests."""
        return not self.format

    def is_same_load(self, other: "Residency") -> bool:
        """Whether both are one load; a later one in the same process took another time."""
        return (self.model_id, self.replica_id, self.load_s) == (
            other.model_id,
            other.replica_id,
            other.load_s,
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to run a request, meant for the model's load in one replica.

    `is_suspect`: a process died while it computed an earlier attempt of the request.
    """

    request_id: str
    replica_id: str
    is_suspect: bool = False


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """A machine of the cluster, and the bytes that all models together may use there."""

    node_id: str = ""
    budget_bytes: int = 0


NO_NODE = NodeMemory()


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """One replica's process: `kept_bytes` is what it holds beside its models.

    `stderr_path` is its log file, empty if there is none.
    """

    replica_id: str
    kept_bytes: int
    stderr_path: str
    node: NodeMemory = NO_NODE


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a format's processes hold; `pid` is that of the first, `tasks` are those of its loop."""

    format: str
    pid: int
    residents: tuple[ModelUsage, ...]
    processes: tuple[ProcessReport, ...] = ()
    tasks: int = 0


@dataclass(frozen=True, slots=True)
class UnloadResult:
    """What an unload freed, in bytes: `returned` of `held`, and what the process keeps.

    `is_known`: the system tells what a process holds.
    """

    held_bytes: int = 0
    returned_bytes: int = 0
    kept_bytes: int = 0
    is_known: bool = False

    @property
    def summary(self) -> str:
        """One line with the numbers, for the decision log."""
        text = f"{format_bytes(self.returned_bytes)} of {format_bytes(self.held_bytes)} came back"
        if self.kept_bytes:
            text += f"; its process keeps {format_bytes(self.kept_bytes)}, which stays counted"
        return text


@dataclass(frozen=True, slots=True)
class LoadContext:
    """Why a router asks for a model.

    `lost_replica`: the replica that should hold the model and does not; `has_died`: its process is
    gone; `is_resumed`: the answer has begun there.  `priority` None means the model's own.
    `is_retry`: a user asked explicitly; ignore earlier failures.
    """

    lost_replica: str = ""
    has_died: bool = False
    is_resumed: bool = False
    is_retry: bool = False
    priority: Priority | None = None


DEFAULT_CONTEXT = LoadContext()


@dataclass(frozen=True, slots=True)
class MemoryLease:
    """Memory in bytes that a job asks for; the same `lease_id` asks for the same memory.

    `name` says what the job does, `model_id` names the model that it reads.
    """

    lease_id: str
    name: str
    model_id: str
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What the scheduler did to a model, and why; `at` is Unix time in seconds."""

    at: float
    event: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryPreview:
    """What a model would take with other settings, and what a load would evict at the moment.

    Without a `plan` in `load` the parts are those of its full context, 0 if it cannot run here.
    `held_bytes` is in use by others, of the `budget_bytes` for all models; `limit_bytes` is what
    other applications leave of that.
    """

    load: LoadPreview
    context_tokens: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    overhead_bytes: int = 0
    budget_bytes: int = 0
    held_bytes: int = 0
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a model is not loaded now; `is_quarantined`: only an explicit load tries it again."""

    is_quarantined: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ModelStates:
    """What the scheduler publishes to routers: faults by model id, residency, thermal policy.

    `keeps_cool`: a bare name means its smallest variant, and downloads wait.  `strain` says what
    strains the machine so that long jobs pause, empty if they may run.  `residencies` are the
    models that take new requests, `loading` the ids of those being loaded, `unloading` of those
    being unloaded.  `catalog_version` changes when a scan or a setting has changed the catalog.
    `version` changes with the content; -1 means that the scheduler does not know yet what is
    resident.
    """

    faults: Mapping[str, Fault] = field(default_factory=dict)
    keeps_cool: bool = False
    residencies: tuple[Residency, ...] = ()
    loading: tuple[str, ...] = ()
    version: int = -1
    strain: str = ""
    unloading: tuple[str, ...] = ()
    catalog_version: int = 0


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What holds memory: a loaded model, a load, an unload, or a job."""

    name: str
    kind: Literal["model", "loading", "unloading", "job"]
    size_bytes: int
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class MachineState:
    """The scheduler's machine: its memory ledger, what strains it, and the newest decisions.

    `limit_bytes` is the most that models may hold now.  States are names of thermal states.
    `decision_number` is that of the last decision; both it and `version` only grow, also over
    restarts of the scheduler.
    """

    budget_bytes: int = 0
    used_bytes: int = 0
    limit_bytes: int = 0
    kept_bytes: int = 0
    uses: tuple[MemoryUse, ...] = ()
    thermal: str = "unknown"
    heat: str = "unknown"
    memory_pressure: str = "unknown"
    is_low_power: bool | None = None
    battery: float | None = None
    is_throttled: bool = False
    admits: bool = True
    strain: str = ""
    decision_number: int = 0
    decisions: tuple[Decision, ...] = ()
    version: int = -1


@dataclass(frozen=True, slots=True)
class ThermalView:
    """The thermal state's name and number, its limits, and the time spent throttled.

    `reason` says what strains the machine.  See `scheduler.thermal` for the others.
    """

    state: str = "unknown"
    level: int = -1
    changes: int = 0
    throttled_s: float = 0.0
    admits: bool = True
    is_throttled: bool = False
    unloads_idle: bool = False
    pauses_jobs: bool = False
    keeps_cool: bool = False
    max_sequences: int | None = None
    prefill_chunk_tokens: int | None = None
    decode_pause_s: float = 0.0
    reason: str = ""
    heat: str = "unknown"
    memory_pressure: str = "unknown"
    is_low_power: bool | None = None
    battery: float | None = None
    sensor_problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """The ledger, the queue, the thermal state, and counts since the scheduler's start.

    `promised_bytes` are part of `used_bytes`.  `waiting` counts requests by their class.
    `taken_at`: monotonic seconds on the scheduler's machine, as the times of `residents` are.
    `parts` are the background tasks of its process.
    """

    budget_bytes: int = 0
    used_bytes: int = 0
    promised_bytes: int = 0
    residents: tuple[LedgerEntry, ...] = ()
    loading: tuple[str, ...] = ()
    waiting: Mapping[str, int] = field(default_factory=dict)
    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    thermal: ThermalView = field(default_factory=ThermalView)
    pid: int = 0
    tasks: int = 0
    taken_at: float = 0.0
    parts: tuple[PartView, ...] = ()
