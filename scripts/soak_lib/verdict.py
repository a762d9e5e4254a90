"""Judges a soak test: which failures a kill explains, whether resources grew, what is left."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.units import MIB
from scripts.soak_lib.clients import Outcome
from scripts.soak_lib.kills import Kill
from scripts.soak_lib.samples import Trend

# Refusals that tell a client to wait: right answers under load.
_WAIT = frozenset({"queue_full", "rate_limit_error", "overloaded_error"})
_BEFORE_S = 1.0


@dataclass(frozen=True, slots=True)
class Accounts:
    """The ledger's bytes of each resident model, and what was measured (bytes; both at the end)."""

    booked: dict[str, float]
    measured: dict[str, float]
    budget_bytes: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The lines of the report, and the lines of what went wrong."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def is_explained(outcome: Outcome, kills: Sequence[Kill]) -> bool:
    """Whether a wrong outcome belongs to a refusal under load or to a process just killed."""
    if outcome.status == 429 or outcome.code in _WAIT:
        return True
    return any(
        outcome.ended_at > kill.at - _BEFORE_S
        and (kill.recovery_s is None or outcome.began_at < kill.at + kill.recovery_s)
        for kill in kills
    )


def judge(
    outcomes: Sequence[Outcome],
    kills: Sequence[Kill],
    found_trends: Sequence[Trend],
    accounts: Accounts,
) -> Verdict:
    """Return the report."""
    verdict = Verdict()
    _judge_outcomes(verdict, outcomes, kills)
    for kill in kills:
        time_s = "not" if kill.recovery_s is None else f"{kill.recovery_s:.1f} s"
        verdict.lines.append(f"killed {kill.kind}: answered again after {time_s}")
        if not kill.is_good:
            verdict.faults.append(
                f"{kill.kind} was killed: recovery {time_s}, {kill.left} processes left or no exit"
            )
    for trend in found_trends:
        scale = MIB if trend.name.endswith("_bytes") else 1
        line = f"{trend.name}: {trend.first / scale:.0f} at first, {trend.last / scale:.0f} at last"
        verdict.lines.append(line)
        if not trend.is_flat:
            verdict.faults.append(f"grew: {line}")
    _judge_accounts(verdict, accounts)
    return verdict


def _judge_outcomes(verdict: Verdict, outcomes: Sequence[Outcome], kills: Sequence[Kill]) -> None:
    kinds = Counter(one.kind for one in outcomes)
    verdict.lines.append(f"{len(outcomes)} requests: {dict(kinds.most_common())}")
    wrong = [one for one in outcomes if not one.is_right]
    unexplained = [one for one in wrong if not is_explained(one, kills)]
    verdict.lines.append(
        f"{len(wrong)} refused or failed, {len(wrong) - len(unexplained)} of them explained by "
        "load or by a kill"
    )
    for one in unexplained:
        ended = "" if one.has_ended else ", stream without an end"
        verdict.faults.append(
            f"{one.kind}: status {one.status} {one.code}{ended}, after "
            f"{one.ended_at - one.began_at:.1f} s: {one.message}"
        )


def _judge_accounts(verdict: Verdict, accounts: Accounts) -> None:
    booked = sum(accounts.booked.values())
    verdict.lines.append(
        f"ledger: {booked / MIB:.0f} MiB of {accounts.budget_bytes / MIB:.0f} MiB for "
        f"{len(accounts.booked)} models"
    )
    if booked > accounts.budget_bytes:
        verdict.faults.append("The ledger holds more than the budget.")
    if accounts.booked.keys() != accounts.measured.keys():
        verdict.faults.append(
            f"The ledger has {sorted(accounts.booked)}, processes hold {sorted(accounts.measured)}."
        )
