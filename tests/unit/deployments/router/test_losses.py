"""When a request whose replica was lost is sent again, and when not."""

import pytest

from core.errors import CrashingRequest, EngineFailed, ImpetusError
from deployments.activity import DeathCause, request_key
from deployments.router.losses import Loss, Losses, loss_of

OWN = DeathCause(frozenset({"m"}), frozenset({request_key("r.0")}))
MODEL = DeathCause(frozenset({"m"}), frozenset({request_key("other")}))
OTHER = DeathCause(frozenset({"other"}), frozenset({request_key("x")}))
IDLE = DeathCause()


@pytest.mark.parametrize(
    ("cause", "has_begun", "loss"),
    [
        (OWN, False, Loss.OWN),
        # An answer that is resumed computes its prompt again.
        (OWN, True, Loss.OWN),
        (MODEL, False, Loss.MODEL),
        (MODEL, True, Loss.MODEL),
        (OTHER, False, Loss.BYSTANDER),
        (OTHER, True, Loss.BYSTANDER),
        (IDLE, False, Loss.BYSTANDER),
        (None, False, Loss.OWN),
        (None, True, Loss.MODEL),
    ],
)
def test_the_record_says_whose_death_it_was(
    cause: DeathCause | None, has_begun: bool, loss: Loss
) -> None:
    assert loss_of(cause, "m", "r.0", has_begun=has_begun) is loss


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ([Loss.OWN], None),
        ([Loss.OWN, Loss.OWN], CrashingRequest),
        ([Loss.OWN, Loss.MODEL, Loss.BYSTANDER, Loss.MISSING, Loss.OWN], CrashingRequest),
        ([Loss.MODEL] * 2, None),
        ([Loss.MODEL] * 3, EngineFailed),
        ([Loss.LOAD], None),
        ([Loss.LOAD, Loss.BYSTANDER, Loss.LOAD], EngineFailed),
        ([Loss.MISSING] * 2, None),
        ([Loss.MISSING] * 3, EngineFailed),
        # Another model's crash loop ends in its quarantine, long before this.
        ([Loss.BYSTANDER] * 9 + [Loss.OWN, Loss.MODEL, Loss.MISSING], None),
        ([Loss.BYSTANDER] * 10, EngineFailed),
    ],
)
def test_a_request_is_sent_again_as_often_as_its_losses_allow(
    losses: list[Loss], end: type[ImpetusError] | None
) -> None:
    subject = Losses("m")
    found = [subject.note(loss, EngineFailed("The process died.")) for loss in losses]
    assert found[:-1] == [None] * (len(losses) - 1)
    if end is None:
        assert found[-1] is None
    else:
        assert type(found[-1]) is end
    assert subject.is_suspect == (Loss.OWN in losses)


def test_what_ends_a_crashing_request_keeps_libraries_from_sending_it_again() -> None:
    subject = Losses("m")
    subject.note(Loss.OWN, EngineFailed("died"))
    end = subject.note(Loss.OWN, EngineFailed("died"))
    assert end is not None
    assert (end.status, end.code, end.retry_after_s, end.may_retry) == (
        500,
        "request_crashed_engine",
        None,
        False,
    )
    assert "m died twice" in end.message
