"""Agents that alternate between models: grouping against first-in-first-out."""

import pytest

from tests.unit.scheduler.simulated import Job, Machine, Model, first_in_first_out

MODELS = {name: Model(50, load_s=2.0, unload_s=0.1) for name in "ABC"}
BUDGET = 100


def trace(rounds: int, gap_s: float, run_s: float) -> list[Job]:
    names = "ABAACABC" * rounds
    return [Job(index * gap_s, name, run_s) for index, name in enumerate(names)]


@pytest.mark.parametrize("gap_s", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("rounds", [3, 10])
def test_alternating_agents_wait_at_most_half_as_long(gap_s: float, rounds: int) -> None:
    jobs = trace(rounds, gap_s, run_s=0.5)
    machine = Machine(MODELS, BUDGET)
    machine.run(jobs)
    assert all(ends == ["granted"] for ends in machine.ends.values())
    mean = sum(machine.latencies.values()) / len(jobs)
    assert mean <= first_in_first_out(MODELS, BUDGET, jobs) / 2


def test_two_agents_in_one_place_share_loads() -> None:
    models = {name: Model(50, load_s=1.0) for name in "AB"}
    jobs = [Job(index * 0.25, "AB"[index % 2], 0.2) for index in range(80)]
    machine = Machine(models, 50)
    machine.run(jobs)
    assert len(machine.loads) <= len(jobs) / 5
