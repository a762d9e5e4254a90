"""How a step's prompt tokens are divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.engine.prefill import PrefillPlanner


def test_plan_gives_a_lone_prompt_the_whole_chunk() -> None:
    assert PrefillPlanner(512).plan([5000], decoding=0) == [512]


def test_plan_lets_a_short_prompt_pass_a_long_one() -> None:
    oldest, short = PrefillPlanner(512).plan([5000, 20], decoding=0)
    assert short == 20
    assert oldest == 492


def test_plan_never_starves_the_oldest() -> None:
    chunks = PrefillPlanner(512).plan([5000, *([300] * 10)], decoding=0)
    assert chunks[0] == 128
    assert sum(chunks) == 512


def test_budget_shrinks_beside_decoding_rows_on_slow_machines() -> None:
    planner = PrefillPlanner(512)
    planner.observe(512, seconds=5.12)
    assert planner.budget(decoding=3, prompts=1) == 32
    assert planner.budget(decoding=0, prompts=1) == 512


def test_budget_stays_whole_on_fast_machines() -> None:
    planner = PrefillPlanner(512)
    planner.observe(512, seconds=0.05)
    assert planner.budget(decoding=3, prompts=1) == 512


@pytest.mark.parametrize(
    ("chunk", "context", "expected"),
    [
        (512, 0, 512),
        (512, 8192, 512),
        (512, 32_768, 512),
        (512, 65_536, 256),
        (512, 131_072, 128),
        (512, 1_000_000, 32),
        (2048, 131_072, 128),
        (16, 1_000_000, 16),
    ],
)
def test_pieces_shrink_as_the_context_grows(chunk: int, context: int, expected: int) -> None:
    planner = PrefillPlanner(chunk)
    assert planner.budget(0, 1, context) == expected
    assert planner.plan([100_000], 0, context) == [expected]
    planner.observe(512, seconds=0.001)
    assert planner.budget(1, 1, context) == expected
    # Where pieces must end at the same places, they do not shrink.
    assert PrefillPlanner(chunk, is_fixed=True).plan([100_000], 0, context) == [chunk]


@pytest.mark.parametrize(
    ("decoding", "prompts", "expected"),
    [(8, 8, 120), (8, 1, 120), (4, 8, 240), (2, 5, 300), (1, 7, 480), (1, 100, 480)],
)
def test_few_streams_do_not_hold_up_many_prompts(
    decoding: int, prompts: int, expected: int
) -> None:
    planner = PrefillPlanner(512)
    planner.observe(500, seconds=0.5)
    assert planner.budget(decoding, prompts) == expected


@given(
    pending=st.lists(st.integers(1, 10_000), max_size=20),
    decoding=st.integers(0, 16),
    speed=st.floats(0.00001, 1),
)
def test_plan_never_exceeds_budget_or_need(pending: list[int], decoding: int, speed: float) -> None:
    planner = PrefillPlanner(512)
    planner.observe(100, 100 * speed)
    chunks = planner.plan(pending, decoding)
    assert len(chunks) == len(pending)
    assert all(0 <= chunk <= need for chunk, need in zip(chunks, pending, strict=True))
    assert (
        sum(chunks) == min(sum(pending), planner.budget(decoding, len(pending)))
        if pending
        else not chunks
    )
    if pending:
        assert chunks[0] > 0


def test_a_limit_bounds_the_chunk_until_it_is_lifted() -> None:
    planner = PrefillPlanner(512)
    planner.limit(64)
    assert sum(planner.plan([1000, 1000], 0)) == 64
    planner.limit(4096)
    assert sum(planner.plan([1000, 1000], 0)) == 512
    planner.limit(None)
    assert sum(planner.plan([1000, 1000], 0)) == 512
