"""What the scheduler knows, as values."""

from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that holds memory; `used_at` is the monotonic second of its last request's end."""

    model_id: str
    size_bytes: int
    used_at: float
    in_flight: int = 0
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class HostState:
    """The ledger of one machine: what models may use together, and who uses it.

    `loading` are bytes promised to models that are being opened.
    """

    budget_bytes: int
    residents: tuple[Resident, ...] = ()
    loading: tuple[tuple[str, int], ...] = field(default_factory=tuple)

    @property
    def used_bytes(self) -> int:
        """Bytes held and promised."""
        held = sum(resident.size_bytes for resident in self.residents)
        return held + sum(size for _, size in self.loading)


@dataclass(frozen=True, slots=True)
class LoadWanted:
    """A request needs a model that is not resident; `needed_bytes` is its estimate."""

    model_id: str
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Drain and free a model; `reason` is for the log."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Open a model; its bytes are promised from now on."""

    model_id: str
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The model cannot be held; the message has the numbers."""

    model_id: str
    message: str


Action: TypeAlias = Unload | Load | Reject
