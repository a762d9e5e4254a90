"""Events that the scheduling policy reacts to, and the actions it returns."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from scheduler.state import HostState, KeepRules, LoadPlan, ModelUsage, Priority


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request needs a model; `deadline` is the monotonic second at which it times out.

    `is_resumed`: its answer has begun on a replica that was lost.
    """

    request_id: int
    model_id: str
    plans: tuple[LoadPlan, ...]
    deadline: float
    priority: Priority = "interactive"
    is_resumed: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """A waiting request was cancelled."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model was loaded, or was found loaded; the load took `load_s` seconds.

    `is_job`: it is a job that has begun, see `LedgerEntry`.
    """

    model_id: str
    size_bytes: int
    load_s: float
    format: str = ""
    is_job: bool = False


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model could not be loaded; `is_memory`: out of memory, a smaller plan may fit."""

    model_id: str
    message: str
    is_memory: bool = False


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model's memory is free: it was unloaded, or its process died.

    `kept` is what its process still holds, as in `Used`.
    """

    model_id: str
    kept: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Used:
    """Replicas reported the usage of their models, and what their processes hold beyond them.

    `asked_at` is the monotonic second before they were asked.  `measured_bytes` of a usage corrects
    the estimate unless it is 0.  `kept` has (process, bytes) of every process that answered.
    """

    usages: tuple[ModelUsage, ...]
    asked_at: float
    kept: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A process is gone; it keeps no memory."""

    process: str


@dataclass(frozen=True, slots=True)
class UnloadWanted:
    """An unload was requested from outside the policy."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Replaced:
    """A loaded model serves no new requests, as its file was replaced; its requests finish.

    Its entry is `old_id` from now on, so that the model can be loaded again beside it.
    """

    model_id: str
    old_id: str


@dataclass(frozen=True, slots=True)
class Configured:
    """A model's settings changed."""

    model_id: str
    settings: KeepRules


@dataclass(frozen=True, slots=True)
class StrainChanged:
    """Critical strain from heat, power or memory pressure began or ended."""

    is_critical: bool


@dataclass(frozen=True, slots=True)
class BudgetChanged:
    """The memory budget changed."""

    budget_bytes: int


@dataclass(frozen=True, slots=True)
class AvailableChanged:
    """Other applications leave this many bytes beside what models hold now; None: unknown."""

    available_bytes: int | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; the models' usage was reported right before."""


Event: TypeAlias = (
    Wanted
    | Left
    | Loaded
    | LoadFailed
    | Unloaded
    | Used
    | ProcessEnded
    | UnloadWanted
    | Replaced
    | Configured
    | StrainChanged
    | BudgetChanged
    | AvailableChanged
    | Tick
)

RejectKind: TypeAlias = Literal["memory", "full", "timeout", "failed"]


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model; its bytes are promised from now on."""

    model_id: str
    plan: LoadPlan
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload an idle model; `for_model` is the model that needs its memory, if any."""

    model_id: str
    reason: str
    for_model: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Send a busy model no new requests and unload it after its last one; see `Unload`."""

    model_id: str
    reason: str
    for_model: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """The request's model is resident: send the request there."""

    request_id: int
    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """The request fails; `reason` is shown to the user and contains the numbers."""

    request_id: int
    model_id: str
    kind: RejectKind
    reason: str
    retry_after_s: int | None = None


Action: TypeAlias = Load | Unload | Drain | Grant | Reject


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state after an event, and the actions to perform, in order."""

    state: HostState
    actions: tuple[Action, ...] = ()

    def then(self, following: "Outcome") -> "Outcome":
        """Return `following` with this outcome's actions before its own."""
        return Outcome(following.state, (*self.actions, *following.actions))
