"""State of the scheduling policy as immutable values: ledger entries, waiting requests, limits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from backends.base import EngineLoad
from core.types import BATCH_DELAY_S
from core.types import Priority as Priority


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One way to load a model: the bytes it will hold.

    `context_tokens` None is the context that the options grant; a number is a reduced one.
    """

    needed_bytes: int
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How the user wants a model kept; `keep_alive_s` None keeps it while there is room."""

    is_pinned: bool = False
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What the ledger holds of a model in memory; times are monotonic seconds.

    `used_at` is its last request's end, `granted_at` when a request was last sent to it.
    `is_closing`: it takes no new requests and is freed after its last one.  `is_job`: not a model,
    but a job that frees its memory only when it ends; it has no `format`.
    """

    model_id: str
    size_bytes: int
    used_at: float
    in_flight: int = 0
    is_pinned: bool = False
    keep_alive_s: float | None = None
    load_s: float = 0.0
    granted_at: float = -math.inf
    is_closing: bool = False
    format: str = ""
    is_job: bool = False

    @property
    def may_close(self) -> bool:
        """Whether the scheduler may unload it, now or after its last request."""
        return not (self.is_pinned or self.is_closing or self.is_job)

    @property
    def has_keep_rule(self) -> bool:
        """Whether the user decides how long it stays: it is pinned or has a keep-alive."""
        return self.is_pinned or self.keep_alive_s is not None

    def idle_s(self, now: float) -> float:
        """Return the seconds since its last use; 0.0 while a request runs."""
        return 0.0 if self.in_flight else max(now - max(self.used_at, self.granted_at), 0.0)


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A model that is being loaded; its bytes are promised."""

    model_id: str
    plan: LoadPlan


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """A replica's report of one loaded model; `idle_s` is seconds since its last request ended.

    `measured_bytes` is the most it will hold by measurement, 0 where nothing was measured.
    """

    model_id: str
    idle_s: float
    in_flight: int
    load: EngineLoad = field(default_factory=EngineLoad)
    measured_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request whose model is not resident; `plans` go from the largest to the smallest.

    `is_resumed`: its answer has begun, so it is served even under critical strain.
    """

    request_id: int
    model_id: str
    plans: tuple[LoadPlan, ...]
    since: float
    deadline: float
    priority: Priority = "interactive"
    is_resumed: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """The policy's constants, in seconds and requests.

    `waiting_per_model` bounds a model's queue.  A batch request is ordered as if it had arrived
    `batch_delay_s` later.  A model in use stays until a request for another has waited
    `hold_factor` times its load time, at most `max_hold_s`; after `patience_s` it is drained even
    if it is never idle.  After a grant, a model counts as busy for `grant_s` until its request is
    seen there.  An interactive request waits `ceiling_wait_s` for other applications' memory.
    """

    waiting_per_model: int = 256
    batch_delay_s: float = BATCH_DELAY_S
    hold_factor: float = 4.0
    max_hold_s: float = 10.0
    patience_s: float = 2.0
    grant_s: float = 1.0
    ceiling_wait_s: float = 10.0
    default_load_s: float = 5.0
    max_retry_s: int = 120


@dataclass(frozen=True, slots=True)
class HostState:
    """The ledger of one machine: its budget, the models that hold memory, the waiting requests.

    `kept` are bytes that a process holds although its models are gone, by process name.
    `is_critical`: under critical strain idle models are unloaded and nothing new is loaded.
    `ceiling_bytes` is what other applications leave to models; None: unknown, or not limited.
    """

    budget_bytes: int
    residents: tuple[LedgerEntry, ...] = ()
    loading: tuple[PendingLoad, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    settings: tuple[tuple[str, KeepRules], ...] = ()
    defaults: KeepRules = field(default_factory=KeepRules)
    limits: Limits = field(default_factory=Limits)
    kept: tuple[tuple[str, int], ...] = ()
    is_critical: bool = False
    ceiling_bytes: int | None = None

    @property
    def load_limit_bytes(self) -> int:
        """The most bytes that models may hold after another load."""
        if self.ceiling_bytes is None:
            return self.budget_bytes
        return min(self.budget_bytes, self.ceiling_bytes)

    @property
    def kept_bytes(self) -> int:
        """Bytes that processes hold beside their models."""
        return sum(count for _, count in self.kept)

    @property
    def used_bytes(self) -> int:
        """Bytes of loaded models, of processes beside them, and promised to loads."""
        held = sum(resident.size_bytes for resident in self.residents)
        return held + self.kept_bytes + sum(model.plan.needed_bytes for model in self.loading)

    @property
    def closing_bytes(self) -> int:
        """Bytes of models that are being unloaded."""
        return sum(resident.size_bytes for resident in self.residents if resident.is_closing)

    @property
    def pinned_bytes(self) -> int:
        """Bytes that no request can free."""
        return sum(
            resident.size_bytes
            for resident in self.residents
            if resident.is_pinned and not resident.is_closing
        )

    def resident(self, model_id: str) -> LedgerEntry | None:
        """Return the entry of a model that holds memory, closing or not; else None."""
        return next((model for model in self.residents if model.model_id == model_id), None)

    def is_loading(self, model_id: str) -> bool:
        """Whether the model is being loaded."""
        return any(model.model_id == model_id for model in self.loading)

    def settings_of(self, model_id: str) -> KeepRules:
        """Return the model's settings, or the defaults."""
        return dict(self.settings).get(model_id, self.defaults)

    def with_residents(self, changed: Iterable[LedgerEntry]) -> "HostState":
        """Return the state with these entries replaced."""
        by_id = {item.model_id: item for item in changed}
        residents = tuple(by_id.get(item.model_id, item) for item in self.residents)
        return replace(self, residents=residents)
