"""Benchmarks a long agent conversation: first token per turn, after an unload and a restart."""

import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench_lib.client import StreamRecord
from scripts.bench_lib.measure import count_prompt_tokens, post
from scripts.bench_lib.peers.processes import running_peer
from scripts.bench_lib.prompts import agent_system_text, first_turn, next_turn
from scripts.bench_lib.report.figures import Verdict
from scripts.bench_lib.report.page import table
from scripts.bench_lib.rounds import CALIBRATION_CHARACTERS, say
from scripts.bench_lib.servers import OURS, BenchError, Load, Server, running_ours

TURNS = 10
ANSWER_TOKENS = 16
MAX_RETURN_SHARE = 0.05
# Share of the context: leaves room for two more turns and for the error of the token estimate.
LONGEST_SHARE = 15 / 16
_UNLOAD_S = 60


@dataclass(frozen=True, slots=True)
class Turn:
    """Time to first token in seconds, and prompt tokens of one turn."""

    first_token_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Conversation:
    """Results of one server by turn; the longest prompt and its repeats are of ours only."""

    turns: list[Turn] = field(default_factory=list)
    longest: Turn | None = None
    after_unload: Turn | None = None
    after_restart: Turn | None = None

    @property
    def later_s(self) -> float:
        """Median time to the first token from the second turn on."""
        return median(turn.first_token_s for turn in self.turns[1:])


class Talk:
    """The growing conversation with one server."""

    def __init__(self, system_text: str) -> None:
        self._body = first_turn(system_text, ANSWER_TOKENS)

    def ask(self, server: Server) -> Turn:
        """Send the conversation, append the answer and the next question.  Raises BenchError."""
        record: StreamRecord = post(server, [self._body])[0]
        if record.error or not record.arrivals:
            raise BenchError(f"{server.name}: {record.error or 'the answer had no text'}")
        self._body = next_turn(self._body, record.text)
        return Turn(
            record.arrivals[0] - record.sent_at, record.prompt_tokens, record.cached_tokens or 0
        )


def measure_agent(
    load: Load, run_id: str, agent_tokens: int, *, with_ours: bool, with_peer: bool
) -> dict[str, Conversation]:
    """Run the conversation on both servers, alternating turn by turn."""
    found: dict[str, Conversation] = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        start = _starter(load, Path(home))
        text = ""
        talks: dict[str, Talk] = {}
        with ExitStack() as stack:
            servers = [stack.enter_context(start())] if with_ours else []
            servers += [stack.enter_context(running_peer(load))] if with_peer else []
            text = _text(servers[0], run_id, agent_tokens)
            talks = {server.name: Talk(text) for server in servers}
            found = {server.name: Conversation() for server in servers}
            for number in range(TURNS):
                for server in servers if number % 2 == 0 else reversed(servers):
                    turn = talks[server.name].ask(server)
                    found[server.name].turns.append(turn)
                    say(f"turn {number + 1}, {server.name}: {turn}")
            if with_ours:
                tokens = int(load.context * LONGEST_SHARE)
                longest = Talk(_text(servers[0], f"{run_id} longest", tokens))
                found[OURS].longest = longest.ask(servers[0])
                say(f"the longest prompt: {found[OURS].longest}")
                _unload(servers[0])
                found[OURS].after_unload = longest.ask(servers[0])
                say(f"after an unload: {found[OURS].after_unload}")
        if with_ours:
            with start() as server:
                found[OURS].after_restart = longest.ask(server)
                say(f"after a restart: {found[OURS].after_restart}")
    return found


def _starter(load: Load, home: Path) -> Callable[[], Any]:
    @contextmanager
    def start() -> Iterator[Server]:
        with running_ours(load, {"IMPETUS_HOME": str(home)}) as server:
            yield server

    return start


def _unload(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/api/models/{server.model}/unload"
    headers = {"Content-Type": "application/json", "X-Impetus-Token": server.management_token}
    request = urllib.request.Request(url, data=b"{}", headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_UNLOAD_S):
            return
    except OSError as problem:
        raise BenchError(f"{server.model} could not be unloaded: {problem}") from problem


def _text(server: Server, run_id: str, agent_tokens: int) -> str:
    """Return a system text of `agent_tokens` tokens that is in no cache."""
    short = agent_system_text(f"{run_id} short", CALIBRATION_CHARACTERS)
    long = agent_system_text(f"{run_id} long", 2 * CALIBRATION_CHARACTERS)
    tokens = count_prompt_tokens(server, long) - count_prompt_tokens(server, short)
    characters = agent_tokens * CALIBRATION_CHARACTERS // max(1, tokens)
    return agent_system_text(f"{run_id} agent", characters)


def agent_verdicts(found: dict[str, Conversation]) -> list[Verdict]:
    """Compare with the targets; missing measurements are marked as such."""
    ours = found.get(OURS)
    if ours is None:
        return []
    peers = [talk for name, talk in found.items() if name != OURS]
    ratio = ours.later_s / peers[0].later_s if peers else None
    verdicts = [
        Verdict(
            "Agent: time to first token from turn 2 on, ours / peer",
            "≤ 1.0",
            f"{ratio:.3f}" if ratio is not None else "–",
            ratio <= 1.0 if ratio is not None else None,
        )
    ]
    returns = {"an unload": ours.after_unload, "a restart": ours.after_restart}
    for what, turn in returns.items():
        cold = ours.longest
        share = turn.first_token_s / cold.first_token_s if turn and cold else None
        verdicts.append(
            Verdict(
                f"Agent: first token after {what}, the model's load included / cold prefill",
                f"≤ {MAX_RETURN_SHARE:.0%}",
                f"{share:.1%}" if share is not None else "–",
                share <= MAX_RETURN_SHARE if share is not None else None,
            )
        )
    return verdicts


def agent_parts(found: dict[str, Conversation]) -> list[str]:
    """Return the chapter's text."""
    rows: list[Sequence[str]] = []
    for number in range(TURNS):
        cells = [f"turn {number + 1}"]
        cells += [_cell(talk.turns[number]) for talk in found.values()]
        rows.append(cells)
    ours = found.get(OURS)
    if ours is not None:
        alone = {
            "longest prompt": ours.longest,
            "its next turn after an unload": ours.after_unload,
            "its next turn after a restart": ours.after_restart,
        }
        for what, turn in alone.items():
            cell = {OURS: _cell(turn) if turn else "–"}
            rows.append([what, *(cell.get(name, "–") for name in found)])
    return [
        "Time to the first token in ms, and cached of all prompt tokens.\n",
        table(["turn", *found], rows),
    ]


def _cell(turn: Turn) -> str:
    return f"{turn.first_token_s * 1000:.0f} ({turn.cached_tokens} of {turn.prompt_tokens})"
