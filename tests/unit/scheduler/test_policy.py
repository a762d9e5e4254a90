"""The ledger's single decisions."""

from collections.abc import Sequence
from dataclasses import replace

from scheduler.events import (
    Action,
    BudgetChanged,
    Configured,
    Drain,
    Event,
    Grant,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Reject,
    Replaced,
    Tick,
    Unload,
    Unloaded,
    UnloadWanted,
    Used,
    Wanted,
)
from scheduler.policy import decide
from scheduler.state import HostState, KeepRules, LedgerEntry, Limits, LoadPlan, ModelUsage


def resident(name: str, size: int, used_at: float = 0.0, in_flight: int = 0) -> LedgerEntry:
    return LedgerEntry(name, size, used_at, in_flight, load_s=1.0)


def wanted(name: str, *sizes: int, number: int = 1, deadline: float = 1e6) -> Wanted:
    plans = tuple(LoadPlan(size, None if index == 0 else 2048) for index, size in enumerate(sizes))
    return Wanted(number, name, plans, deadline)


def feed(state: HostState, *events: tuple[float, Event]) -> Outcome:
    """Return the last state, with the actions of all events."""
    outcome = Outcome(state)
    for now, event in events:
        outcome = outcome.then(decide(outcome.state, event, now))
    return outcome


def kinds(actions: Sequence[Action]) -> list[tuple[str, str]]:
    return [(type(action).__name__, action.model_id) for action in actions]


def test_f7_what_fits_is_loaded_and_granted_to_all_who_wait() -> None:
    outcome = feed(
        HostState(100, (resident("a", 40),)),
        (10.0, wanted("b", 60, number=1)),
        (11.0, wanted("b", 60, number=2)),
        (12.0, Loaded("b", 60, 2.0)),
    )
    assert kinds(outcome.actions) == [("Load", "b"), ("Grant", "b"), ("Grant", "b")]
    assert outcome.state.used_bytes == 100
    assert not outcome.state.waiting


def test_a_resident_model_is_granted_at_once() -> None:
    outcome = feed(HostState(100, (resident("a", 40),)), (10.0, wanted("a", 40)))
    assert outcome.actions == (Grant(1, "a", "it is resident"),)


def test_a_load_begins_only_when_the_memory_came_back() -> None:
    state = HostState(100, (resident("a", 80),))
    outcome = feed(state, (10.0, wanted("b", 60)))
    assert kinds(outcome.actions) == [("Unload", "a")]
    assert "60 B" in outcome.actions[0].reason
    outcome = feed(outcome.state, (11.0, Tick()))
    assert outcome.actions == ()
    outcome = feed(outcome.state, (12.0, Unloaded("a")))
    assert outcome.actions == (Load("b", LoadPlan(60), "b needs 60 B"),)


def test_f7_a_model_asked_for_while_it_closes_is_loaded_after() -> None:
    state = HostState(100, (replace(resident("a", 80), is_closing=True),))
    outcome = feed(state, (1.0, wanted("a", 80)))
    assert outcome.actions == ()
    assert kinds(feed(outcome.state, (2.0, Unloaded("a"))).actions) == [("Load", "a")]


def test_f7_a_busy_model_is_drained_only_after_the_patience() -> None:
    state = HostState(100, (resident("a", 80, in_flight=1),))
    outcome = feed(state, (10.0, wanted("b", 60)), (11.9, Tick()))
    assert outcome.actions == ()
    assert kinds(feed(outcome.state, (12.1, Tick())).actions) == [("Drain", "a")]


def test_a_model_in_use_keeps_its_place_until_its_load_is_paid_for() -> None:
    state = HostState(100, (resident("a", 80, in_flight=1),))
    outcome = feed(
        state,
        (10.0, wanted("b", 60)),
        (11.0, Used((ModelUsage("a", 0.0, 0),), 10.9)),
        (11.2, Tick()),
    )
    assert outcome.actions == ()
    # Nobody used it for as long as a load takes: it goes.
    assert kinds(feed(outcome.state, (12.0, Tick())).actions) == [("Unload", "a")]


def test_a_request_on_its_way_protects_the_model() -> None:
    state = HostState(100, (resident("a", 80, used_at=5.0),))
    outcome = feed(state, (10.0, wanted("a", 80)), (10.1, wanted("b", 60, number=2)))
    assert kinds(outcome.actions) == [("Grant", "a")]
    outcome = feed(outcome.state, (11.1, Tick()))
    assert kinds(outcome.actions) == [("Unload", "a")]


def test_f5_a_lowered_context_comes_before_a_drain_and_a_refusal() -> None:
    state = HostState(100, (resident("a", 50, in_flight=1),))
    outcome = feed(state, (10.0, wanted("b", 60, 40)), (11.0, Tick()))
    assert outcome.actions == ()
    (load,) = feed(outcome.state, (12.5, Tick())).actions
    assert isinstance(load, Load)
    assert load.plan == LoadPlan(40, 2048)
    pinned = HostState(100, (replace(resident("a", 50), is_pinned=True),))
    (load,) = feed(pinned, (10.0, wanted("b", 60, 40))).actions
    assert isinstance(load, Load)
    assert load.plan == LoadPlan(40, 2048)


def test_f5_what_cannot_fit_beside_pinned_models_is_refused_with_the_numbers() -> None:
    state = HostState(4096, (replace(resident("a", 3072), is_pinned=True),))
    (reject,) = feed(state, (1.0, wanted("b", 2048))).actions
    assert isinstance(reject, Reject)
    assert reject.kind == "memory"
    for number in ("2.0 KiB", "4.0 KiB", "3.0 KiB"):
        assert number in reject.reason


def test_a_request_whose_time_is_over_is_told_when_to_come_back() -> None:
    state = HostState(100, (resident("a", 80, in_flight=1),))
    outcome = feed(state, (1.0, wanted("b", 60, deadline=2.0)), (2.0, Tick()))
    (reject,) = outcome.actions
    assert isinstance(reject, Reject)
    assert reject.kind == "timeout"
    assert reject.retry_after_s == 1
    assert not outcome.state.waiting


def test_f7_who_left_is_not_loaded_for() -> None:
    state = HostState(100, (resident("a", 80),))
    outcome = feed(state, (1.0, wanted("b", 60)), (2.0, Left(1)), (3.0, Unloaded("a")))
    assert kinds(outcome.actions) == [("Unload", "a")]


def test_a_failed_load_ends_its_requests_and_only_those() -> None:
    outcome = feed(
        HostState(100),
        (1.0, wanted("a", 60, number=1)),
        (1.0, wanted("b", 60, number=2)),
        (2.0, LoadFailed("a", "damaged")),
    )
    assert kinds(outcome.actions) == [("Load", "a"), ("Reject", "a"), ("Load", "b")]
    assert [item.request_id for item in outcome.state.waiting] == [2]


def test_f5_a_load_that_lacked_memory_is_tried_with_less_and_then_given_up() -> None:
    outcome = feed(
        HostState(100), (1.0, wanted("a", 60, 40)), (2.0, LoadFailed("a", "no room", True))
    )
    loads = [action.plan for action in outcome.actions if isinstance(action, Load)]
    assert loads == [LoadPlan(60), LoadPlan(40, 2048)]
    (reject,) = feed(outcome.state, (3.0, LoadFailed("a", "no room", True))).actions
    assert isinstance(reject, Reject)
    assert reject.reason == "no room"


def test_f16_an_idle_model_goes_when_its_keep_alive_is_over() -> None:
    state = HostState(100, (resident("a", 40), resident("b", 40)))
    outcome = feed(state, (1.0, Configured("a", KeepRules(keep_alive_s=5.0))), (4.9, Tick()))
    assert outcome.actions == ()
    assert kinds(feed(outcome.state, (5.0, Tick())).actions) == [("Unload", "a")]


def test_f16_a_used_or_pinned_model_outlives_its_keep_alive() -> None:
    rules = KeepRules(keep_alive_s=5.0)
    state = HostState(100, (resident("a", 40, in_flight=1),))
    assert not feed(state, (1.0, Configured("a", rules)), (9.0, Tick())).actions
    rules = KeepRules(is_pinned=True, keep_alive_s=5.0)
    state = HostState(100, (resident("a", 40),))
    assert not feed(state, (1.0, Configured("a", rules)), (9.0, Tick())).actions


def test_rules_hold_for_models_that_are_loaded_later() -> None:
    rules = KeepRules(is_pinned=True)
    outcome = feed(HostState(100), (1.0, Configured("a", rules)), (2.0, Loaded("a", 40, 1.0)))
    assert outcome.state.pinned_bytes == 40


def test_f6_a_measurement_over_the_budget_frees_idle_models() -> None:
    state = HostState(100, (resident("a", 40, in_flight=1), resident("b", 40)))
    outcome = feed(state, (1.0, Used((ModelUsage("a", 0.0, 1, measured_bytes=70),), 0.0)))
    assert kinds(outcome.actions) == [("Unload", "b")]
    assert outcome.state.used_bytes == 110


def test_f6_a_smaller_budget_frees_what_is_over_it() -> None:
    state = HostState(100, (resident("a", 40, used_at=1.0), resident("b", 40, used_at=2.0)))
    outcome = feed(state, (3.0, BudgetChanged(50)))
    assert kinds(outcome.actions) == [("Unload", "a")]


def test_unloading_on_demand_lets_running_requests_end() -> None:
    state = HostState(100, (resident("a", 40, in_flight=1), resident("b", 40)))
    outcome = feed(state, (1.0, UnloadWanted("a", "asked")), (1.0, UnloadWanted("b", "asked")))
    assert outcome.actions == (Drain("a", "asked"), Unload("b", "asked"))
    assert feed(outcome.state, (2.0, UnloadWanted("a", "asked"))).actions == ()


def test_an_aged_request_keeps_later_ones_from_taking_its_room() -> None:
    limits = Limits(hold_factor=0.0)
    state = HostState(100, (resident("a", 40, in_flight=1), resident("p", 20)), limits=limits)
    state = replace(
        state, residents=(state.residents[0], replace(state.residents[1], is_pinned=True))
    )
    outcome = feed(state, (1.0, wanted("big", 80)), (4.0, wanted("small", 40, number=2)))
    assert kinds(outcome.actions) == [("Drain", "a")]
    outcome = feed(outcome.state, (5.0, Unloaded("a")))
    assert kinds(outcome.actions) == [("Load", "big")]


def test_a_replaced_model_is_loaded_beside_its_old_requests() -> None:
    outcome = feed(
        HostState(100, (resident("a", 40, in_flight=1),)),
        (10.0, Replaced("a", "a (replaced 1)")),
        (11.0, wanted("a", 50)),
        (12.0, Loaded("a", 50, 1.0)),
        (13.0, Unloaded("a (replaced 1)")),
    )
    assert kinds(outcome.actions) == [("Load", "a"), ("Grant", "a")]
    assert [item.model_id for item in outcome.state.residents] == ["a"]


def test_a_replaced_model_waits_for_its_old_memory_and_evicts_nothing_for_it() -> None:
    state = HostState(100, (resident("a", 60, in_flight=1), resident("b", 30, used_at=9.0)))
    outcome = feed(state, (10.0, Replaced("a", "a (replaced 1)")), (11.0, wanted("a", 60)))
    assert kinds(outcome.actions) == []
    outcome = feed(outcome.state, (12.0, Unloaded("a (replaced 1)")))
    assert kinds(outcome.actions) == [("Load", "a")]


def test_the_old_entry_of_a_replaced_model_is_neither_pinned_nor_evicted() -> None:
    pinned = replace(resident("a", 60), is_pinned=True)
    outcome = feed(HostState(100, (pinned,)), (10.0, Replaced("a", "old")), (11.0, wanted("b", 90)))
    # It is freed by itself: the request waits and is not refused.
    assert kinds(outcome.actions) == []
    assert [item.model_id for item in outcome.state.waiting] == ["b"]
