"""Runs interleaved rounds, so changes of the machine's speed affect both servers equally."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from scripts.bench_lib.measure import (
    AgentResult,
    IdleResult,
    StreamsResult,
    count_prompt_tokens,
    post,
    run_agent,
    run_idle,
    run_streams,
)
from scripts.bench_lib.prompts import agent_system_text, short_body, stream_bodies
from scripts.bench_lib.servers import BenchError, Server

CALIBRATION_CHARACTERS = 2000
FIRST_TOKEN_REQUESTS = 12
AGENT_ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run; token counts are per request.

    `rounds` is the maximum: another round starts only if it fits `budget_s`.
    """

    run_id: str
    rounds: int
    streams: tuple[int, ...]
    tokens: int
    agent_rounds: int
    agent_tokens: int
    idle_s: float
    budget_s: float
    agent_budget_s: float


@dataclass(slots=True)
class Results:
    """One server's figures, one entry per round; first-token times are seconds."""

    streams: dict[int, list[StreamsResult]] = field(default_factory=lambda: defaultdict(list))
    first_token_s: list[list[float]] = field(default_factory=list)
    agent: list[AgentResult] = field(default_factory=list)
    idle_before: IdleResult | None = None
    idle_after: IdleResult | None = None
    problems: list[str] = field(default_factory=list)

    def rounds_of(self, count: int) -> list[StreamsResult]:
        """Return the results with this number of streams; may be empty."""
        return self.streams.get(count, [])


def rounds_within(
    rounds: int, budget_s: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[int]:
    """Yield round numbers: always 0, and more while the longest round so far fits the time left."""
    began = clock()
    longest_s = 0.0
    for number in range(rounds):
        started = clock()
        if number and started - began + longest_s > budget_s:
            return
        yield number
        longest_s = max(longest_s, clock() - started)


def run(plan: Plan, servers: Sequence[Server]) -> dict[str, Results]:
    """Run the whole plan; only one server generates at a time."""
    results = {server.name: Results() for server in servers}
    for server in servers:
        post(server, stream_bodies(f"{plan.run_id} warm-up", 2, 8))
        results[server.name].idle_before = run_idle(server, plan.idle_s)
    for number in rounds_within(plan.rounds, plan.budget_s):
        order = list(servers) if number % 2 == 0 else list(reversed(servers))
        _run_round(plan, number, order, results)
    characters = _agent_characters(plan, servers[0]) if plan.agent_rounds else 0
    for number in rounds_within(plan.agent_rounds, plan.agent_budget_s):
        order = list(servers) if number % 2 == 0 else list(reversed(servers))
        text = agent_system_text(f"{plan.run_id}-{number}", characters)
        for server in order:
            try:
                agent = run_agent(server, text, min(plan.tokens, AGENT_ANSWER_TOKENS))
            except BenchError as error:
                results[server.name].problems.append(f"agent conversation {number + 1}: {error}")
                continue
            results[server.name].agent.append(agent)
            say(f"agent {number + 1}, {server.name}: computed {agent.computed_share:.1%}")
    for server in servers:
        results[server.name].idle_after = run_idle(server, plan.idle_s)
    return results


def _run_round(
    plan: Plan, number: int, order: Sequence[Server], results: dict[str, Results]
) -> None:
    for count in plan.streams:
        bodies = stream_bodies(f"{plan.run_id} {number} of {count}", count, plan.tokens)
        for server in order:
            result = run_streams(server, bodies)
            results[server.name].streams[count].append(result)
            results[server.name].problems.extend(
                f"round {number + 1}, {count} streams: {reason}" for reason in result.failed
            )
            say(
                f"round {number + 1}, {count} streams, {server.name}: {result.total_rate:.1f} "
                f"tokens/s, first token {result.first_token_s * 1000:.0f} ms"
            )
    times: dict[str, list[float]] = {server.name: [] for server in order}
    for index in range(FIRST_TOKEN_REQUESTS):
        run_id = f"{plan.run_id} {number} first {index}"
        bodies = [short_body(run_id)]
        for server in order if index % 2 == 0 else reversed(order):
            times[server.name].append(run_streams(server, bodies).first_token_s)
    for name, values in times.items():
        results[name].first_token_s.append(values)


def _agent_characters(plan: Plan, server: Server) -> int:
    """Return the length of the agent's text in characters for the planned number of tokens."""
    short = agent_system_text(f"{plan.run_id} short", CALIBRATION_CHARACTERS)
    long = agent_system_text(f"{plan.run_id} long", 2 * CALIBRATION_CHARACTERS)
    tokens = count_prompt_tokens(server, long) - count_prompt_tokens(server, short)
    return plan.agent_tokens * CALIBRATION_CHARACTERS // max(1, tokens)


def say(text: str) -> None:
    """Print progress to the terminal."""
    print(text, file=sys.stderr, flush=True)
