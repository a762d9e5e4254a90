"""Strain, keep-alive races, and what processes keep: the policy's part of it."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.events import (
    Configured,
    Event,
    Grant,
    Left,
    Loaded,
    ProcessEnded,
    StrainChanged,
    Tick,
    Unload,
    Unloaded,
    Used,
    Wanted,
)
from scheduler.policy import decide
from scheduler.state import HostState, KeepRules, LedgerEntry, Limits, LoadPlan, ModelUsage
from tests.unit.scheduler.test_policy import feed, kinds, resident, wanted

CRITICAL, OVER = StrainChanged(True), StrainChanged(False)


def test_f15_critical_strain_unloads_idle_models_but_no_busy_or_pinned_one() -> None:
    pinned = LedgerEntry("pinned", 10, 0.0, is_pinned=True)
    state = HostState(100, (resident("idle", 20), resident("busy", 20, in_flight=1), pinned))
    outcome = feed(state, (10.0, CRITICAL))
    assert kinds(outcome.actions) == [("Unload", "idle")]
    assert "critical strain" in outcome.actions[0].reason


def test_f15_a_model_goes_after_its_last_request() -> None:
    state = HostState(100, (resident("a", 20, in_flight=1),))
    idle = Used((ModelUsage("a", 0.0, 0),), 11.0)
    outcome = feed(state, (10.0, CRITICAL), (12.0, idle), (12.0, Tick()))
    assert kinds(outcome.actions) == [("Unload", "a")]


def test_f15_requests_wait_out_the_strain_and_those_begun_do_not() -> None:
    begun = Wanted(2, "b", (LoadPlan(10),), 1e6, is_resumed=True)
    outcome = feed(HostState(100), (1.0, CRITICAL), (2.0, wanted("a", 10)), (3.0, begun))
    assert kinds(outcome.actions) == [("Load", "b")]
    outcome = feed(outcome.state, (4.0, OVER))
    assert kinds(outcome.actions) == [("Load", "a")]


def test_f15_who_waits_too_long_for_the_strain_to_end_is_told_so() -> None:
    state = feed(HostState(100), (1.0, CRITICAL)).state
    outcome = feed(state, (2.0, wanted("a", 10, deadline=5.0)), (6.0, Tick()))
    (reject,) = outcome.actions
    assert "recover from heat" in reject.reason


def test_what_a_process_keeps_counts_until_it_ends() -> None:
    kept = (("p", 30),)
    outcome = feed(HostState(100, (resident("a", 40),)), (1.0, Unloaded("a", kept)))
    assert outcome.state.used_bytes == 30
    refused = feed(outcome.state, (2.0, wanted("b", 80)))
    assert kinds(refused.actions) == [("Reject", "b")]
    assert "30 B by processes that did not release it" in refused.actions[0].reason
    loaded = feed(outcome.state, (2.0, ProcessEnded("p")), (3.0, wanted("b", 80)))
    assert kinds(loaded.actions) == [("Load", "b")]


def test_what_came_back_later_is_free_again() -> None:
    state = HostState(100, kept=(("p", 30), ("q", 5)))
    assert feed(state, (1.0, Used((), 1.0, (("p", 0),)))).state.used_bytes == 5


@settings(deadline=None, max_examples=200)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("strain"), st.booleans()),
            st.tuples(st.just("want"), st.sampled_from("abc")),
            st.tuples(st.just("tick"), st.none()),
        ),
        max_size=40,
    )
)
def test_f15_under_strain_nothing_is_loaded_and_no_request_ends_twice(
    steps: list[tuple[str, object]],
) -> None:
    state, now, ends = HostState(100), 0.0, {}
    for number, (kind, value) in enumerate(steps):
        now += 3.0
        event: Event = Tick()
        if kind == "strain":
            event = StrainChanged(bool(value))
        elif kind == "want":
            event = Wanted(number, str(value), (LoadPlan(60),), 1e6)
        pending = [event]
        while pending:
            outcome = decide(state, pending.pop(0), now)
            state = outcome.state
            for action in outcome.actions:
                match type(action).__name__:
                    case "Load":
                        assert not state.is_critical
                        pending.append(Loaded(action.model_id, 60, 0.1))
                    case "Unload" | "Drain":
                        pending.append(Unloaded(action.model_id))
                    case _:
                        assert isinstance(action, Grant)
                        assert action.request_id not in ends
                        ends[action.request_id] = action.model_id
            assert state.used_bytes <= state.budget_bytes


def test_f16_a_keep_alive_that_ends_never_takes_a_model_from_a_request() -> None:
    """A thousand trials: a request comes around the very moment the keep-alive is over."""
    chance = random.Random(16)
    limits = Limits()
    for _ in range(1000):
        keep_s = chance.choice([0.0, 0.5, 5.0])
        state = HostState(100, limits=limits)
        state = feed(state, (0.0, Configured("a", KeepRules(keep_alive_s=keep_s)))).state
        state = feed(state, (0.0, wanted("a", 50, number=0)), (1.0, Loaded("a", 50, 1.0))).state
        times = [1.0 + keep_s + chance.uniform(-min(keep_s, 0.5), 1.5) for _ in range(4)]
        events: list[tuple[float, Event]] = [(times[0], wanted("a", 50, number=1))]
        events += [(at, Tick()) for at in times[1:]]
        granted_at, is_gone = 1.0, False
        for now, event in sorted(events, key=lambda pair: pair[0]):
            outcome = decide(state, event, now)
            state = outcome.state
            for action in outcome.actions:
                if isinstance(action, Unload):
                    # The request that was granted has until then to reach the model.
                    assert now - granted_at >= limits.grant_s
                    is_gone = True
                if isinstance(action, Grant):
                    assert not is_gone
                    granted_at = now
        if is_gone:
            state = feed(state, (50.0, Unloaded("a")), (51.0, Loaded("a", 50, 1.0))).state
        assert not state.waiting


def test_f16_a_request_that_left_keeps_nothing_alive() -> None:
    state = HostState(100, (resident("a", 50, in_flight=1),))
    outcome = feed(state, (1.0, wanted("b", 80)), (1.5, Left(1)), (10.0, Tick()))
    assert outcome.actions == ()
