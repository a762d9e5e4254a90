"""What the ledger tells those who ask: counts since its start, and why a request was refused."""

from dataclasses import dataclass

from core.errors import EngineFailed, InsufficientMemory, QueueFull, Unavailable
from scheduler.events import Reject


@dataclass(slots=True)
class Tally:
    """How often things happened since the start."""

    loads: int = 0
    load_failures: int = 0
    evictions: int = 0


def error_of(reject: Reject, failure: BaseException | None) -> BaseException:
    """Return the error of a refused request; `failure` is what its model's load raised last."""
    retry = reject.retry_after_s
    match reject.kind:
        case "memory":
            return InsufficientMemory(reject.reason, param="model", retry_after_s=retry)
        case "full":
            return QueueFull(reject.reason, param="model", retry_after_s=retry)
        case "timeout":
            return Unavailable(reject.reason, param="model", retry_after_s=retry)
        case _:
            return failure or EngineFailed(reject.reason)
