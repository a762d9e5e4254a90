"""Benchmarks one format's streams against its peer, in interleaved rounds within a time limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench_lib.measure import StreamsResult
from scripts.bench_lib.prompts import stream_bodies
from scripts.bench_lib.rounds import Results, rounds_within, say
from scripts.bench_lib.servers import BenchError

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server or loop to measure, and the stream counts to measure it with."""

    name: str
    counts: tuple[int, ...]
    measure: Callable[[Sequence[dict[str, Any]]], StreamsResult]


@dataclass(frozen=True, slots=True)
class ContestPlan:
    """The plan: `tokens` per answer, at most `rounds` rounds, as many as fit `budget_s`."""

    run_id: str
    rounds: int
    tokens: int
    budget_s: float


def run_contest(plan: ContestPlan, contestants: Sequence[Contestant]) -> dict[str, Results]:
    """Run the plan; one contestant generates at a time, in alternating order.

    Raises BenchError if one cannot answer its first request, which loads the model.
    """
    results = {each.name: Results() for each in contestants}
    for each in contestants:
        warm_up = each.measure(stream_bodies(f"{plan.run_id} warm-up", 1, WARM_UP_TOKENS))
        if warm_up.failed:
            raise BenchError(f"{each.name}: {warm_up.failed[0]}")
    counts = sorted({count for each in contestants for count in each.counts})
    for number in rounds_within(plan.rounds, plan.budget_s):
        order = contestants if number % 2 == 0 else contestants[::-1]
        for count in counts:
            bodies = stream_bodies(f"{plan.run_id} {number} of {count}", count, plan.tokens)
            for each in order:
                if count in each.counts:
                    _run_one(each, number, bodies, results[each.name])
    return results


def _run_one(
    contestant: Contestant, number: int, bodies: Sequence[dict[str, Any]], results: Results
) -> None:
    count = len(bodies)
    result = contestant.measure(bodies)
    results.streams[count].append(result)
    results.problems.extend(
        f"round {number + 1}, {count} streams: {reason}" for reason in result.failed
    )
    say(
        f"round {number + 1}, {count} streams, {contestant.name}: {result.total_rate:.1f} "
        f"tokens/s, first token {result.first_token_s * 1000:.0f} ms"
    )
