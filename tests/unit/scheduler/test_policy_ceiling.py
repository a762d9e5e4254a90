"""What other applications leave to models: loads stay below it, and requests are told."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.events import (
    Action,
    AvailableChanged,
    Load,
    Loaded,
    Reject,
    Tick,
    Unloaded,
    Wanted,
)
from scheduler.policy import decide
from scheduler.state import HostState, LedgerEntry, LoadPlan
from tests.unit.scheduler.simulated import Job, Machine, Model
from tests.unit.scheduler.test_policy import feed, kinds, resident, wanted


def test_a_load_needs_what_other_applications_leave_not_only_the_budget() -> None:
    state = HostState(100, (resident("a", 20),))
    outcome = feed(state, (1.0, AvailableChanged(30)), (2.0, wanted("b", 30, number=1)))
    assert outcome.state.load_limit_bytes == 50
    assert kinds(outcome.actions) == [("Load", "b")]
    outcome = feed(state, (1.0, AvailableChanged(30)), (2.0, wanted("b", 31, number=1)))
    # The idle model gives way: then 50 are left for the two of them.
    assert kinds(outcome.actions) == [("Unload", "a")]
    outcome = feed(outcome.state, (3.0, Unloaded("a")))
    assert kinds(outcome.actions) == [("Load", "b")]


def test_the_budget_bounds_loads_whatever_is_free() -> None:
    outcome = feed(HostState(100), (1.0, AvailableChanged(5000)), (2.0, wanted("a", 101)))
    assert outcome.state.load_limit_bytes == 100
    assert kinds(outcome.actions) == [("Reject", "a")]
    assert "other applications" not in outcome.actions[0].reason


def test_a_request_waits_for_other_applications_then_is_told_what_they_leave() -> None:
    state = feed(HostState(100), (1.0, AvailableChanged(30)), (2.0, wanted("a", 80, 40))).state
    assert kinds(feed(state, (11.9, Tick())).actions) == []
    (reject,) = feed(state, (12.0, Tick())).actions
    assert isinstance(reject, Reject)
    assert reject.kind == "memory"
    assert reject.retry_after_s is not None
    for part in ("a needs 40 B", "leave 30 B of it", "Close other applications", "memory_budget"):
        assert part in reject.reason
    # An application was closed: the smaller context is loaded.
    freed = feed(state, (11.0, AvailableChanged(60))).actions
    assert freed == (Load("a", LoadPlan(40, 2048), "a needs 40 B"),)


def test_a_batch_request_waits_until_its_deadline() -> None:
    request = Wanted(1, "a", (LoadPlan(80),), 60.0, "batch")
    state = feed(HostState(100), (1.0, AvailableChanged(30)), (2.0, request)).state
    assert feed(state, (59.0, Tick())).actions == ()
    (reject,) = feed(state, (60.0, Tick())).actions
    assert isinstance(reject, Reject)
    assert reject.kind == "timeout"
    assert "other applications leave 30 B" in reject.reason


def test_the_ceiling_does_not_move_with_the_models() -> None:
    state = feed(HostState(100), (1.0, AvailableChanged(60)), (2.0, wanted("a", 40))).state
    assert state.loading
    # Half of it is read already: neither reading tells what models may hold.
    state = feed(state, (3.0, AvailableChanged(40))).state
    assert state.ceiling_bytes == 60
    state = feed(state, (4.0, Loaded("a", 40, 2.0)), (5.0, AvailableChanged(20))).state
    assert state.ceiling_bytes == 60
    closing = decide(state, wanted("b", 60, number=2), 20.0).state
    assert closing.closing_bytes == 40
    assert feed(closing, (21.0, AvailableChanged(45))).state.ceiling_bytes == 60


def test_models_in_memory_stay_while_other_applications_grow() -> None:
    state = HostState(100, (resident("a", 40), LedgerEntry("b", 40, 0.0)))
    outcome = feed(state, (9.0, AvailableChanged(0)), (99.0, Tick()))
    assert outcome.actions == ()


def test_an_unknown_reading_limits_nothing() -> None:
    state = feed(HostState(100), (1.0, AvailableChanged(30)), (2.0, AvailableChanged(None))).state
    assert state.load_limit_bytes == 100


@dataclass(slots=True)
class SharedMachine(Machine):
    """A machine on which other applications hold `others` bytes from each time on."""

    others: Sequence[tuple[float, int]] = ()

    def _report(self) -> None:
        Machine._report(self)
        taken = [size for at, size in sorted(self.others) if at <= self.now]
        free = self.budget - self.state.used_bytes - (taken[-1] if taken else 0)
        self._send(AvailableChanged(max(free, 0)))

    def _perform(self, action: Action) -> None:
        if isinstance(action, Load):
            assert self.state.used_bytes <= self.state.load_limit_bytes
        Machine._perform(self, action)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(5, 100), min_size=3, max_size=3),
    jobs=st.lists(
        st.builds(
            Job,
            at=st.floats(0, 30),
            model_id=st.sampled_from("abc"),
            run_s=st.floats(0.01, 8),
            priority=st.sampled_from(["interactive", "batch"]),
        ),
        min_size=1,
        max_size=6,
    ),
    others=st.lists(st.tuples(st.floats(0, 60), st.integers(0, 90)), max_size=4),
)
def test_every_request_ends_once_and_no_load_passes_the_ceiling(
    sizes: list[int], jobs: list[Job], others: list[tuple[float, int]]
) -> None:
    models = {name: Model(size) for name, size in zip("abc", sizes, strict=True)}
    machine = SharedMachine(models, 100, timeout_s=150.0, others=others)
    machine.run(jobs)
    assert all(len(ends) == 1 for ends in machine.ends.values())
    for number, (end,) in machine.ends.items():
        assert end in {"granted", "memory", "timeout"}
        # What fits beside the most that others ever hold is served.
        if (
            sizes["abc".index(jobs[number].model_id)] + max((b for _, b in others), default=0)
            <= 100
        ):
            assert end == "granted"
