"""Heat, memory pressure and power become states, with hysteresis both ways, and limits."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.limits import UNLIMITED
from scheduler.thermal import (
    FALL_S,
    RISE_S,
    Reading,
    Strain,
    ThermalState,
    advance,
    directive,
)

UNKNOWN, NOMINAL, FAIR, SERIOUS, CRITICAL = ThermalState
STATES = st.sampled_from(list(ThermalState))


def states_of(
    readings: Iterable[tuple[float, ThermalState]], strain: Strain | None = None
) -> list[ThermalState]:
    """Return the state after each (time, reading)."""
    states = []
    for now, seen in readings:
        strain = advance(strain, seen, now)
        states.append(strain.state)
    return states


@pytest.mark.parametrize("first", list(ThermalState))
def test_the_first_reading_holds_at_once(first: ThermalState) -> None:
    assert states_of([(100.0, first)]) == [first]


def test_a_short_peak_changes_nothing() -> None:
    readings = [(0.0, NOMINAL), (1.0, CRITICAL), (1.0 + RISE_S / 2, CRITICAL), (9.0, NOMINAL)]
    assert states_of([*readings, (10.0, CRITICAL)]) == [NOMINAL] * 5


def test_heat_that_lasts_rises_to_the_least_of_its_readings() -> None:
    readings = [(0.0, NOMINAL), (1.0, CRITICAL), (2.0, SERIOUS), (1.0 + RISE_S, CRITICAL)]
    assert states_of(readings) == [NOMINAL, NOMINAL, NOMINAL, SERIOUS]


def test_cooling_takes_longer_and_falls_to_the_worst_of_its_readings() -> None:
    at = 10.0
    readings = [(0.0, CRITICAL), (at, NOMINAL), (at + RISE_S, FAIR), (at + FALL_S, NOMINAL)]
    assert states_of(readings) == [CRITICAL, CRITICAL, CRITICAL, FAIR]


def test_one_hot_reading_starts_the_cooling_anew() -> None:
    readings = [(0.0, SERIOUS), (1.0, FAIR), (FALL_S, SERIOUS), (FALL_S + 2, FAIR)]
    assert states_of([*readings, (2 * FALL_S, FAIR)])[-1] == SERIOUS
    assert states_of([*readings, (2 * FALL_S + 2, FAIR)])[-1] == FAIR


def test_f15_flapping_about_a_limit_changes_the_state_at_most_once() -> None:
    readings = [(float(now), SERIOUS if now % 4 < 2 else FAIR) for now in range(300)]
    assert sum(a != b for a, b in pairwise(states_of(readings))) <= 1


def test_f15_all_states_up_and_down() -> None:
    readings = [
        (60.0 * minute + second, state)
        for minute, state in enumerate([NOMINAL, FAIR, SERIOUS, CRITICAL, SERIOUS, NOMINAL])
        for second in range(0, 60, 2)
    ]
    states = states_of(readings)
    changes = [states[0], *(b for a, b in pairwise(states) if a != b)]
    assert changes == [NOMINAL, FAIR, SERIOUS, CRITICAL, SERIOUS, NOMINAL]


def test_a_sensor_that_is_lost_ends_the_throttling_as_cooling_does() -> None:
    readings = [(0.0, CRITICAL), (2.0, UNKNOWN), (FALL_S, UNKNOWN), (FALL_S + 2, UNKNOWN)]
    assert states_of(readings) == [CRITICAL, CRITICAL, CRITICAL, UNKNOWN]


@given(st.lists(st.tuples(st.floats(0.5, 20.0), STATES), min_size=1, max_size=60))
def test_states_change_only_to_what_was_seen_and_never_faster_than_allowed(
    steps: list[tuple[float, ThermalState]],
) -> None:
    now, strain = 0.0, advance(None, NOMINAL, 0.0)
    one_sided_since = now
    for wait, seen in steps:
        now += wait
        before, strain = strain, advance(strain, seen, now)
        if before.bound is None or (before.bound > before.state) != (seen > before.state):
            one_sided_since = now
        if strain.state == before.state:
            continue
        is_rise = strain.state > before.state
        assert is_rise == (seen > before.state)
        assert now - one_sided_since >= (RISE_S if is_rise else FALL_S)
        assert (strain.state <= seen) if is_rise else (strain.state >= seen)


@given(STATES, st.floats(0.0, 1e6))
def test_steady_readings_reach_their_state(seen: ThermalState, start: float) -> None:
    readings = [(start + 2.0 * index, seen) for index in range(20)]
    assert states_of(readings, Strain(NOMINAL))[-1] == seen


@pytest.mark.parametrize(
    ("reading", "state"),
    [
        (Reading(), UNKNOWN),
        (Reading(NOMINAL), NOMINAL),
        (Reading(SERIOUS, FAIR), SERIOUS),
        (Reading(NOMINAL, CRITICAL), CRITICAL),
        (Reading(is_low_power=False), NOMINAL),
        (Reading(NOMINAL, is_low_power=True), SERIOUS),
        (Reading(NOMINAL, is_low_power=False, battery=0.9), FAIR),
        (Reading(NOMINAL, is_low_power=False, battery=0.2), SERIOUS),
        (Reading(CRITICAL, battery=0.1), CRITICAL),
    ],
)
def test_the_worst_of_heat_memory_and_power_counts(reading: Reading, state: ThermalState) -> None:
    assert reading.state is state


@pytest.mark.parametrize(
    ("reading", "causes"),
    [
        (Reading(), ""),
        (Reading(NOMINAL, NOMINAL, is_low_power=False), ""),
        (Reading(SERIOUS), "the machine is hot (serious)"),
        (Reading(memory=CRITICAL, is_low_power=True),
         "memory is short (critical), low power mode is on"),
        (Reading(battery=0.153), "the battery is at 15%"),
    ],
)  # fmt: skip
def test_what_strains_the_machine_is_told_in_words(reading: Reading, causes: str) -> None:
    assert reading.causes == causes


@pytest.mark.parametrize("state", [UNKNOWN, NOMINAL])
def test_unknown_and_nominal_throttle_nothing(state: ThermalState) -> None:
    order = directive(state, 16, 512)
    assert order.limits == UNLIMITED
    assert order.admits
    assert not order.pauses_jobs
    assert not order.unloads_idle


def test_fair_pauses_jobs_and_leaves_interactive_work_alone() -> None:
    order = directive(FAIR, 16, 512)
    assert order.limits == UNLIMITED
    assert order.pauses_jobs
    assert order.admits


@pytest.mark.parametrize(("opened", "allowed"), [(16, 8), (3, 1), (1, 1)])
def test_serious_halves_the_sequences(opened: int, allowed: int) -> None:
    order = directive(SERIOUS, opened, 512)
    assert order.limits.max_sequences == allowed
    assert order.admits
    assert not order.unloads_idle


def test_f15_critical_admits_nothing_and_unloads_idle_models() -> None:
    order = directive(CRITICAL, 16, 512)
    assert not order.admits
    assert order.pauses_jobs
    assert order.unloads_idle


def test_worse_states_give_smaller_chunks_and_longer_pauses() -> None:
    serious, critical = (directive(state, 16, 512).limits for state in (SERIOUS, CRITICAL))
    assert 512 > (serious.prefill_chunk_tokens or 0) > (critical.prefill_chunk_tokens or 0) > 0
    assert 0 < serious.decode_pause_s < critical.decode_pause_s


def test_chunks_are_never_larger_than_those_of_the_settings() -> None:
    assert directive(SERIOUS, 16, 16).limits.prefill_chunk_tokens == 16
    assert directive(CRITICAL, 16, 16).limits.prefill_chunk_tokens == 16
