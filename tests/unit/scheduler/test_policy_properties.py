"""The policy's promises, over random requests on a simulated machine."""

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.state import KeepRules, Limits
from tests.unit.scheduler.simulated import Job, Machine, Model

NAMES = ("a", "b", "c", "d")
JOB = "job"

models = st.fixed_dictionaries(
    {
        name: st.builds(
            Model,
            size=st.integers(20, 100),
            load_s=st.floats(0.05, 3),
            unload_s=st.floats(0.01, 0.5),
            smaller=st.none() | st.integers(5, 19),
            fails=st.integers(0, 1),
        )
        for name in NAMES
    }
    | {JOB: st.builds(Model, size=st.integers(20, 100), load_s=st.just(0.0), is_job=st.just(True))}
)
jobs = st.lists(
    st.builds(
        Job,
        at=st.floats(0, 30),
        model_id=st.sampled_from((*NAMES, JOB)),
        run_s=st.floats(0.01, 8),
        priority=st.sampled_from(["interactive", "batch"]),
        patience_s=st.none() | st.floats(0.01, 10),
    ),
    max_size=25,
)
rules = st.dictionaries(
    st.sampled_from(NAMES),
    st.builds(KeepRules, st.booleans(), st.none() | st.floats(0, 5)),
)


@settings(deadline=None, max_examples=150)
@given(models=models, jobs=jobs, rules=rules)
def test_f7_every_request_ends_once_within_the_budget(
    models: dict[str, Model], jobs: list[Job], rules: dict[str, KeepRules]
) -> None:
    """The machine itself asserts budget, single loads, and that what is busy or pinned stays."""
    machine = Machine(models, 100, rules=rules)
    machine.run(jobs)
    assert all(len(ends) == 1 for ends in machine.ends.values())
    has_pins = any(rule.is_pinned for rule in rules.values())
    for number, (end,) in machine.ends.items():
        assert end in {"granted", "left", "failed", "memory"}
        if end == "memory":
            assert has_pins
        if end == "failed":
            assert models[jobs[number].model_id].fails


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(20, 100), min_size=4, max_size=4),
    gap_s=st.floats(0.1, 0.5),
    run_s=st.floats(0.05, 1.5),
    late=st.lists(st.tuples(st.floats(0, 20), st.sampled_from("bcd")), min_size=1, max_size=5),
)
def test_f9_no_request_starves_beside_a_model_that_is_never_idle(
    sizes: list[int], gap_s: float, run_s: float, late: list[tuple[float, str]]
) -> None:
    models = {name: Model(size, load_s=0.5) for name, size in zip(NAMES, sizes, strict=True)}
    stream = [Job(index * gap_s, "a", run_s) for index in range(int(25 / gap_s))]
    others = [Job(at, name, run_s) for at, name in late]
    machine = Machine(models, 100)
    machine.run(stream + others)
    # Each of at most four groups before it waits for patience or hold, a drain and a load.
    limits = Limits()
    hold_s = max(limits.patience_s, limits.hold_factor * 0.5)
    longest = 4 * (hold_s + run_s + 0.5 + limits.grant_s)
    assert max(machine.waits.values()) < longest


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), bound=st.integers(1, 20))
def test_f9_exactly_the_surplus_is_refused(count: int, bound: int) -> None:
    machine = Machine({"a": Model(100)}, 100, limits=Limits(waiting_per_model=bound))
    machine.run([Job(0.0, "a") for _ in range(count)])
    ends = [end for (end,) in machine.ends.values()]
    assert ends == ["granted"] * min(count, bound) + ["full"] * max(0, count - bound)
