"""When a model that fails is tried again, and when it is put away."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.faults import (
    DEATH_WINDOW_S,
    DEATHS_TO_QUARANTINE,
    LONGEST_PAUSE_S,
    FaultRecord,
    load_failed,
    loaded,
    process_died,
    wait_s,
)


def test_f12_the_pause_doubles_with_every_failure_and_ends() -> None:
    record, pauses = FaultRecord("files"), []
    for number in range(10):
        record = load_failed(record, "damaged", 1000.0 * number)
        pauses.append(wait_s(record, 1000.0 * number))
    assert pauses[:3] == [5.0, 10.0, 20.0]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert wait_s(record, 9000.0 + LONGEST_PAUSE_S) == 0.0
    assert wait_s(loaded(record), 9000.0) == 0.0


@pytest.mark.parametrize(("last_at", "is_out"), [(299.0, True), (300.0, False)])
def test_f11_three_deaths_count_only_within_five_minutes(last_at: float, is_out: bool) -> None:
    record = FaultRecord("files")
    for name, at in (("a", 0.0), ("b", 1.0), ("c", last_at)):
        record = process_died(record, name, "died", at)
    assert record.is_quarantined is is_out


def test_f11_a_load_that_works_forgives_failures_but_no_deaths() -> None:
    record = process_died(FaultRecord("files"), "a", "died", 0.0)
    assert loaded(record).deaths == record.deaths


@given(
    deaths=st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 1000)), max_size=30).map(
        lambda found: sorted(found, key=lambda pair: pair[1])
    )
)
def test_f11_quarantine_means_that_many_processes_within_the_window(
    deaths: list[tuple[str, float]],
) -> None:
    record = FaultRecord("files")
    firsts: dict[str, float] = {}
    for name, at in deaths:
        for known in [one for one, first in firsts.items() if at - first >= DEATH_WINDOW_S]:
            del firsts[known]
        firsts.setdefault(name, at)
        was_out = record.is_quarantined
        record = process_died(record, name, "died", at)
        assert record.is_quarantined == (was_out or len(firsts) >= DEATHS_TO_QUARANTINE)
