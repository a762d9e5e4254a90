"""Decides whether a request is sent again after the replica that ran it was lost (pure)."""

from dataclasses import dataclass
from enum import Enum

from core.errors import CrashingRequest, EngineFailed, ImpetusError
from deployments.activity import DeathCause


class Loss(Enum):
    """How a request lost its replica.

    `MISSING`: the replica lives without the model.  Else its process died: of loading the model, of
    this request, while it computed the request's model, or while it computed another model.
    """

    MISSING = "missing"
    LOAD = "load"
    OWN = "own"
    MODEL = "model"
    BYSTANDER = "bystander"


# The loss that ends a request.  A bystander is bounded only against an endless crash loop.
_LIMITS = {Loss.MISSING: 3, Loss.LOAD: 2, Loss.OWN: 2, Loss.MODEL: 3, Loss.BYSTANDER: 10}


def loss_of(cause: DeathCause | None, model_id: str, request_id: str, *, has_begun: bool) -> Loss:
    """Return what a process's death was to one of its requests.

    Without a record of the process's work, a request without any answer may be the cause.
    """
    if cause is None:
        return Loss.MODEL if has_begun else Loss.OWN
    if cause.names(request_id):
        return Loss.OWN
    return Loss.MODEL if model_id in cause.models else Loss.BYSTANDER


@dataclass(slots=True)
class Losses:
    """The losses of one request, over all its attempts."""

    model_id: str
    counts: dict[Loss, int]

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.counts = dict.fromkeys(Loss, 0)

    @property
    def is_suspect(self) -> bool:
        """Whether a process may have died of this request."""
        return self.counts[Loss.OWN] > 0

    def note(self, loss: Loss, problem: ImpetusError) -> ImpetusError | None:
        """Count a loss; return the error that ends the request, None if it is sent again."""
        self.counts[loss] += 1
        if self.counts[loss] < _LIMITS[loss]:
            return None
        if loss is Loss.OWN:
            return CrashingRequest(
                f"The process of {self.model_id} died twice while it prepared this request, so the "
                "request is not sent again. Change it: leave out unusually long words, a grammar "
                "or a schema, or shorten the prompt. The server's log has the last lines of the "
                "process."
            )
        if loss is Loss.LOAD:
            return EngineFailed(
                f"The process died twice while it loaded {self.model_id}. The model's `reason` in "
                "/v1/models and the server's log tell more; try another quantization or format."
            )
        return EngineFailed(problem.message, retry_after_s=2)
