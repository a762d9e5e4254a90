"""What happens to the scheduler, and what it does about it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from scheduler.state import HostState, KeepRules, LoadPlan, ModelUsage, Priority


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request needs a model; `deadline` is the monotonic second at which it gives up.

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
    """A request that waited does so no more."""

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
    """A model could not be opened; `is_memory`: for want of memory, so less may do."""

    model_id: str
    message: str
    is_memory: bool = False


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model's memory is free: it was unloaded, or its process died.

    `kept` is what its process holds all the same, as in `Used`.
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
    """A process is gone, with all that it kept."""

    process: str


@dataclass(frozen=True, slots=True)
class UnloadWanted:
    """Somebody, not the policy, wants a model unloaded."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Configured:
    """A model's settings changed."""

    model_id: str
    settings: KeepRules


@dataclass(frozen=True, slots=True)
class StrainChanged:
    """The machine came under critical strain from heat, power or memory, or is over it."""

    is_critical: bool


@dataclass(frozen=True, slots=True)
class BudgetChanged:
    """The machine can give more or less than before."""

    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; the models' use was reported right before."""


Event: TypeAlias = (
    Wanted
    | Left
    | Loaded
    | LoadFailed
    | Unloaded
    | Used
    | ProcessEnded
    | UnloadWanted
    | Configured
    | StrainChanged
    | BudgetChanged
    | Tick
)

RejectKind: TypeAlias = Literal["memory", "full", "timeout", "failed"]


@dataclass(frozen=True, slots=True)
class Load:
    """Open a model; its bytes are promised from now on."""

    model_id: str
    plan: LoadPlan
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Free an idle model; `for_model` is the one that needs its place, if that is why."""

    model_id: str
    reason: str
    for_model: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Send a busy model no more requests and free it after the last; see `Unload`."""

    model_id: str
    reason: str
    for_model: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """The request's model is resident: it may go there."""

    request_id: int
    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """The request ends with an error; `reason` is for the user and has the numbers."""

    request_id: int
    model_id: str
    kind: RejectKind
    reason: str
    retry_after_s: int | None = None


Action: TypeAlias = Load | Unload | Drain | Grant | Reject


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state after an event, and what is to be done, in order."""

    state: HostState
    actions: tuple[Action, ...] = ()

    def then(self, following: "Outcome") -> "Outcome":
        """Return `following`, with what was to be done before it."""
        return Outcome(following.state, (*self.actions, *following.actions))
