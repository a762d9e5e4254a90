"""Tests of the figures of the benchmark's agent conversation."""

from scripts.bench_lib.agent import TURNS, Conversation, Turn, agent_parts, agent_verdicts
from scripts.bench_lib.prompts import first_turn, next_turn
from scripts.bench_lib.servers import OURS


def conversation(first_s: float, later_s: float, return_s: float | None = None) -> Conversation:
    turns = [Turn(first_s, 5000, 0), *(Turn(later_s, 5100, 5050) for _ in range(TURNS - 1))]
    found = Conversation(turns)
    if return_s is not None:
        found.longest = Turn(2 * first_s, 8000, 0)
        found.after_unload = found.after_restart = Turn(return_s, 8100, 8064)
    return found


def test_the_targets_are_those_of_the_longest_prompt_and_of_the_peer() -> None:
    found = {OURS: conversation(10, 0.2, 1.2), "peer": conversation(9, 0.25)}
    assert [verdict.is_reached for verdict in agent_verdicts(found)] == [True, False, False]
    assert [verdict.measured for verdict in agent_verdicts(found)] == ["0.800", "6.0%", "6.0%"]


def test_what_was_not_measured_is_no_success() -> None:
    assert [verdict.is_reached for verdict in agent_verdicts({OURS: conversation(10, 1)})] == [
        None, None, None,
    ]  # fmt: skip
    assert agent_verdicts({"peer": conversation(10, 1)}) == []


def test_the_table_has_every_turn_and_both_returns() -> None:
    _, text = agent_parts({OURS: conversation(10, 0.2, 0.4), "peer": conversation(9, 0.25)})
    assert len(text.splitlines()) == 2 + TURNS + 3
    assert "| its next turn after a restart | 400 (8064 of 8100) | – |" in text


def test_each_turn_goes_on_from_the_last() -> None:
    one = first_turn("rules", 4)
    two = next_turn(one, "yes")
    three = next_turn(two, "no")
    assert three["messages"][: len(two["messages"])] == two["messages"]
    assert three["messages"][-1] != two["messages"][-1]
    assert [message["content"] for message in three["messages"]].count("no") == 1
