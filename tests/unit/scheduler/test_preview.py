"""What a load would do at the moment, as the policy decides it, without doing it."""

from dataclasses import replace

from scheduler.preview import LoadPreview, preview
from scheduler.state import HostState, LedgerEntry, LoadPlan, PendingLoad, Waiting

NOW = 1000.0


def entry(name: str, size: int, *, used_at: float = 0.0, in_flight: int = 0) -> LedgerEntry:
    return LedgerEntry(name, size, used_at, in_flight, load_s=1.0)


def plans(*sizes: int) -> tuple[LoadPlan, ...]:
    return tuple(LoadPlan(size, None if index == 0 else 2048) for index, size in enumerate(sizes))


def test_what_is_free_is_enough() -> None:
    state = HostState(100, (entry("a", 40),))
    assert preview(state, "b", plans(60), NOW) == LoadPreview("now", LoadPlan(60))


def test_idle_models_make_room_the_longest_unused_first() -> None:
    state = HostState(100, (entry("a", 40, used_at=900), entry("c", 40, used_at=100)))
    found = preview(state, "b", plans(60), NOW)
    assert found == LoadPreview("after_unloading", LoadPlan(60), ("c",))
    assert preview(state, "b", plans(100), NOW).evicted == ("c", "a")


def test_the_memory_of_the_model_itself_counts_as_free() -> None:
    state = HostState(100, (entry("b", 90, in_flight=3), entry("a", 10)))
    assert preview(state, "b", plans(90), NOW) == LoadPreview("now", LoadPlan(90))
    loading = HostState(100, loading=(PendingLoad("b", LoadPlan(90)),))
    assert preview(loading, "b", plans(100), NOW) == LoadPreview("now", LoadPlan(100))


def test_a_smaller_context_comes_before_the_end_of_running_requests() -> None:
    state = HostState(100, (entry("a", 40, in_flight=1),))
    assert preview(state, "b", plans(80, 60), NOW) == LoadPreview("now", LoadPlan(60, 2048))
    busy = preview(state, "b", plans(80, 70), NOW)
    assert busy == LoadPreview("after_requests", LoadPlan(80), ("a",))


def test_pinned_models_stay_and_the_numbers_are_told() -> None:
    state = HostState(100, (replace(entry("a", 40), is_pinned=True),))
    found = preview(state, "b", plans(80, 70), NOW)
    assert (found.fit, found.plan, found.evicted) == ("no", None, ())
    assert "b needs 70 B; of the 100 B for all models, 40 B is in use" in found.reason
    assert preview(state, "b", plans(80, 60), NOW).plan == LoadPlan(60, 2048)


def test_other_applications_leave_too_little() -> None:
    state = HostState(100, ceiling_bytes=50)
    found = preview(state, "b", plans(60), NOW)
    assert found.fit == "no"
    assert "other applications leave 50 B" in found.reason


def test_jobs_and_unloads_have_to_end_first() -> None:
    for held in (
        replace(entry("job", 60), is_job=True),
        replace(entry("a", 60), is_closing=True),
    ):
        found = preview(HostState(100, (held,)), "b", plans(60), NOW)
        assert found == LoadPreview("after_requests", LoadPlan(60))
    others = HostState(100, loading=(PendingLoad("a", LoadPlan(60)),))
    assert preview(others, "b", plans(60), NOW) == LoadPreview("after_requests", LoadPlan(60))


def test_strain_and_other_requests_do_not_count() -> None:
    others = (Waiting(7, "c", plans(100), 0.0, 2000.0),)
    state = HostState(100, waiting=others, is_critical=True)
    assert preview(state, "b", plans(60), NOW) == LoadPreview("now", LoadPlan(60))
    assert state.waiting == others


def test_a_model_without_a_plan_does_not_fit() -> None:
    assert preview(HostState(100), "b", (), NOW).fit == "no"
