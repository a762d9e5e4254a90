"""The ledger's decisions, checked over random states."""

from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy import decide
from scheduler.state import HostState, Load, LoadWanted, Reject, Resident, Unload


def resident(name: str, size: int, used_at: float = 0.0, in_flight: int = 0) -> Resident:
    return Resident(name, size, used_at, in_flight)


def test_decide_loads_what_fits() -> None:
    state = HostState(100, (resident("a", 40),))
    assert decide(state, LoadWanted("b", 60)) == (Load("b", 60),)


def test_decide_does_nothing_for_resident_and_loading_models() -> None:
    state = HostState(100, (resident("a", 40),), (("b", 40),))
    assert decide(state, LoadWanted("a", 40)) == ()
    assert decide(state, LoadWanted("b", 40)) == ()


def test_decide_unloads_the_longest_unused_idle_model_first() -> None:
    state = HostState(
        100,
        (
            resident("busy", 40, used_at=1.0, in_flight=1),
            resident("old", 30, used_at=2.0),
            resident("new", 30, used_at=3.0),
        ),
    )
    actions = decide(state, LoadWanted("d", 30))
    assert [action.model_id for action in actions] == ["old", "d"]
    assert isinstance(actions[0], Unload)


def test_decide_rejects_with_the_numbers() -> None:
    state = HostState(2048, (Resident("pinned", 1024, 0.0, is_pinned=True),))
    (action,) = decide(state, LoadWanted("big", 2000))
    assert isinstance(action, Reject)
    assert "2.0 KiB" in action.message
    assert "1.0 KiB" in action.message


residents = st.lists(
    st.builds(
        Resident,
        model_id=st.uuids().map(str),
        size_bytes=st.integers(0, 100),
        used_at=st.floats(0, 1000),
        in_flight=st.integers(0, 2),
        is_pinned=st.booleans(),
    ),
    max_size=8,
)


@given(residents=residents, free=st.integers(0, 100), needed=st.integers(0, 300))
def test_decide_never_exceeds_the_budget_nor_evicts_pinned(
    residents: list[Resident], free: int, needed: int
) -> None:
    budget = sum(model.size_bytes for model in residents) + free
    state = HostState(budget, tuple(residents))
    actions = decide(state, LoadWanted("wanted", needed))
    by_id = {model.model_id: model for model in residents}
    gone = [action.model_id for action in actions if isinstance(action, Unload)]
    assert all(not by_id[model_id].is_pinned for model_id in gone)
    assert len(set(gone)) == len(gone)
    left = sum(model.size_bytes for model in residents if model.model_id not in gone)
    if isinstance(actions[-1], Load):
        assert left + needed <= budget
    else:
        assert isinstance(actions[-1], Reject)
        assert not gone
        pinned = sum(model.size_bytes for model in residents if model.is_pinned)
        assert pinned + needed > budget
