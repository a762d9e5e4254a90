"""Who makes room for others."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.eviction import expired, is_busy, is_held, victims
from scheduler.state import LedgerEntry, Limits

LIMITS = Limits()


def model(name: str, size: int, used_at: float = 0.0, load_s: float = 1.0) -> LedgerEntry:
    return LedgerEntry(name, size, used_at, load_s=load_s)


def names(chosen: object) -> list[str]:
    assert isinstance(chosen, list | tuple)
    return [item.model_id for item in chosen]


def test_the_longest_idle_of_equals_goes_first() -> None:
    candidates = [model("new", 30, used_at=9.0), model("old", 30, used_at=2.0)]
    assert names(victims(20, candidates, 10.0)) == ["old"]


def test_what_loads_quickly_goes_before_what_loads_slowly() -> None:
    candidates = [model("slow", 30, load_s=60.0), model("quick", 30, used_at=5.0, load_s=1.0)]
    assert names(victims(20, candidates, 10.0)) == ["quick"]


def test_one_that_suffices_goes_before_several() -> None:
    candidates = [model("a", 30), model("b", 30), model("large", 60)]
    assert names(victims(60, candidates, 10.0)) == ["large"]


def test_what_became_superfluous_stays() -> None:
    candidates = [model("small", 10, load_s=0.1), model("large", 60, load_s=5.0)]
    assert names(victims(60, candidates, 10.0)) == ["large"]


def test_a_keep_alive_near_its_end_goes_first() -> None:
    kept = model("kept", 30, used_at=5.0)
    ending = replace(model("ending", 30, used_at=5.0), keep_alive_s=6.0)
    assert names(victims(20, [kept, ending], 10.0)) == ["ending"]


def test_nothing_is_chosen_where_nothing_is_missing_or_all_is_too_little() -> None:
    assert victims(0, [model("a", 30)], 1.0) == ()
    assert victims(31, [model("a", 30), model("empty", 0)], 1.0) is None


def test_a_request_on_its_way_makes_a_model_busy_for_a_while() -> None:
    sent = replace(model("a", 1, used_at=5.0), granted_at=10.0)
    assert is_busy(sent, 10.5, LIMITS)
    assert not is_busy(sent, 11.5, LIMITS)
    assert not is_busy(replace(sent, used_at=10.2), 10.5, LIMITS)


def test_a_model_is_held_against_those_who_came_before_its_last_use() -> None:
    used = model("a", 1, used_at=10.0, load_s=2.0)
    assert is_held(used, 9.0, 11.0, LIMITS)
    assert not is_held(used, 10.5, 11.0, LIMITS)
    assert not is_held(used, 9.0, 12.5, LIMITS)
    assert not is_held(used, 1.0, 11.0, LIMITS)


def test_only_idle_unpinned_models_expire() -> None:
    ending = replace(model("a", 1), keep_alive_s=5.0)
    others = [
        replace(ending, model_id="pinned", is_pinned=True),
        replace(ending, model_id="busy", in_flight=1),
        replace(ending, model_id="closing", is_closing=True),
        replace(ending, model_id="fresh", used_at=8.0),
        model("ever", 1),
    ]
    assert names(expired([ending, *others], 10.0, LIMITS)) == ["a"]


candidates = st.lists(
    st.builds(
        LedgerEntry,
        model_id=st.uuids().map(str),
        size_bytes=st.integers(0, 100),
        used_at=st.floats(0, 1000),
        load_s=st.floats(0, 100),
        keep_alive_s=st.none() | st.floats(0, 1000),
    ),
    max_size=8,
)


@given(candidates=candidates, needed=st.integers(1, 900), now=st.floats(0, 2000))
def test_victims_suffice_and_none_is_superfluous(
    candidates: list[LedgerEntry], needed: int, now: float
) -> None:
    chosen = victims(needed, candidates, now)
    if chosen is None:
        assert sum(item.size_bytes for item in candidates) < needed
        return
    freed = sum(item.size_bytes for item in chosen)
    assert freed >= needed
    assert all(freed - item.size_bytes < needed for item in chosen)
    assert len({item.model_id for item in chosen}) == len(chosen)
