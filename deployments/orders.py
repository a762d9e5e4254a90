"""What the deployments tell each other, as frozen dataclasses that cross by pickle."""

from dataclasses import dataclass

from backends.base import EngineLoad, EngineOptions, ModelInfo


@dataclass(frozen=True, slots=True)
class FileMark:
    """A file as it was when the catalog looked at it."""

    path: str
    size_bytes: int
    modified_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Which model a replica shall open, and how."""

    model_id: str
    info: ModelInfo
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class Residency:
    """A model in memory: where, with which context in tokens, and what the load took.

    To those who waited for the load, `evicted` names the models that made room for it.
    """

    model_id: str
    format: str
    replica_id: str
    node_id: str
    context_tokens: int
    load_s: float
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResidentReport:
    """One resident model's state; `idle_s` is seconds since its last request ended.

    `measured_bytes` is what it will hold at most by measurement, 0 where nobody measured.
    """

    model_id: str
    idle_s: float
    in_flight: int
    load: EngineLoad
    measured_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica's process and what it holds."""

    format: str
    pid: int
    residents: tuple[ResidentReport, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the scheduler did to a model, and why; `at` is Unix time in seconds."""

    at: float
    event: str
    action: str
    reason: str
