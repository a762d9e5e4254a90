"""Order, bounds and advice of the queue."""

from scheduler.queue import groups, is_full, overdue, retry_after_s
from scheduler.state import HostState, LedgerEntry, Limits, LoadPlan, PendingLoad, Priority, Waiting


def waiting(
    number: int, model_id: str, since: float, priority: Priority = "interactive"
) -> Waiting:
    return Waiting(number, model_id, (LoadPlan(10),), since, since + 100.0, priority)


def test_requests_for_one_model_are_one_group_as_old_as_the_oldest() -> None:
    state = HostState(
        100, waiting=(waiting(1, "b", 5.0), waiting(2, "a", 3.0), waiting(3, "b", 1.0))
    )
    found = groups(state)
    assert [(group.model_id, group.since) for group in found] == [("b", 1.0), ("a", 3.0)]


def test_batch_requests_come_after_interactive_ones_until_they_aged() -> None:
    batch = waiting(1, "batch", 0.0, "batch")
    soon = HostState(100, waiting=(batch, waiting(2, "now", 29.0)))
    late = HostState(100, waiting=(batch, waiting(2, "now", 31.0)))
    assert [group.model_id for group in groups(soon)] == ["now", "batch"]
    assert [group.model_id for group in groups(late)] == ["batch", "now"]


def test_each_model_has_its_own_bound() -> None:
    limits = Limits(waiting_per_model=2)
    state = HostState(
        100, waiting=(waiting(1, "a", 0.0), waiting(2, "a", 0.0), waiting(3, "b", 0.0)),
        limits=limits,
    )  # fmt: skip
    assert is_full(state, "a")
    assert not is_full(state, "b")


def test_the_advice_is_whole_seconds_and_grows_with_what_is_to_be_loaded() -> None:
    held = (LedgerEntry("r", 10, 0.0, load_s=2.2), LedgerEntry("s", 10, 0.0, load_s=3.0))
    assert retry_after_s(HostState(100, held)) == 3
    busy = HostState(
        100,
        held,
        (PendingLoad("c", LoadPlan(10)),),
        (waiting(1, "a", 0.0), waiting(2, "b", 0.0), waiting(3, "a", 0.0)),
    )
    assert retry_after_s(busy) == 8
    many = tuple(waiting(number, str(number), 0.0) for number in range(100))
    assert retry_after_s(HostState(100, waiting=many)) == Limits().max_retry_s


def test_a_deadline_ends_at_its_second() -> None:
    request = waiting(1, "a", 0.0)
    assert not overdue([request], 99.9)
    assert overdue([request], 100.0) == [request]
