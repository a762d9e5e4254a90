"""The log of events: what is replayed, what is not, and what is too old."""

import pytest

from router.events.log import KEPT_SUBJECTS, EventLog


def numbers(log: EventLog, after: int, limit: int = 10_000) -> list[int] | None:
    found = log.after(after, limit)
    return None if found is None else [event.number for event in found]


def test_events_after_a_number_come_in_order_and_in_batches() -> None:
    log = EventLog("run")
    for _ in range(5):
        log.append("a", "{}")
    assert numbers(log, 0) == [1, 2, 3, 4, 5]
    assert numbers(log, 3) == [4, 5]
    assert numbers(log, 1, 2) == [2, 3]
    assert numbers(log, 5) == []
    (event,) = log.after(4, 10) or ()
    assert event.text == "id: run-5\nevent: a\ndata: {}\n\n"


def test_the_last_thousand_are_kept_and_an_older_place_is_too_old() -> None:
    log = EventLog("run")
    for _ in range(1007):
        log.append("a", "{}")
    assert numbers(log, 6) is None
    assert numbers(log, 7) == list(range(8, 1008))


def test_progress_replaces_the_older_one_and_pushes_nothing_out() -> None:
    log = EventLog("run", kept=3)
    log.append("model.state", "{}")
    for step in range(5000):
        log.append("job.progress", f'{{"step": {step}}}', subject="job 1")
        log.append("job.progress", f'{{"step": {step}}}', subject="job 2")
    log.append("model.state", "{}")
    assert numbers(log, 0) == [1, 10_000, 10_001, 10_002]
    assert numbers(log, 9_000) == [10_000, 10_001, 10_002]


def test_the_end_of_a_subject_removes_its_progress() -> None:
    log = EventLog("run")
    log.append("job.progress", "{}", subject="job 1")
    log.append("job.progress", "{}", subject="job 2")
    log.append("job.changed", "{}", ends="job 1")
    assert numbers(log, 0) == [2, 3]


def test_subjects_and_bytes_are_bounded() -> None:
    log = EventLog("run", kept_bytes=1000)
    for number in range(KEPT_SUBJECTS + 5):
        log.append("job.progress", "{}", subject=f"job {number}")
    assert numbers(log, 4) is None
    assert len(numbers(log, 5) or ()) == KEPT_SUBJECTS
    for _ in range(10):
        log.append("a", "x" * 300)
    assert numbers(log, log.last - 4) is None
    assert numbers(log, log.last - 3) == [log.last - 2, log.last - 1, log.last]


@pytest.mark.parametrize(
    ("event_id", "number"),
    [
        ("run-2", 2),
        ("run-0", 0),
        ("run-3", None),
        ("other-2", None),
        ("run-", None),
        ("run--1", None),
        ("", None),
        ("run-٢", None),
        ("run-2\n", None),
    ],
)
def test_only_ids_of_this_run_have_a_number(event_id: str, number: int | None) -> None:
    log = EventLog("run")
    log.append("a", "{}")
    log.append("a", "{}")
    assert log.number_of(event_id) == number
