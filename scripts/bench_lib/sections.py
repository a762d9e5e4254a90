"""The sections of the benchmark: what each runs and reports."""

import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from core.errors import ImpetusError
from scripts.bench_lib.agent import (
    ANSWER_TOKENS,
    TURNS,
    agent_parts,
    agent_verdicts,
    measure_agent,
)
from scripts.bench_lib.catalog import (
    CATALOG_HEAD,
    catalog_rows,
    catalog_verdicts,
    measure_catalog,
)
from scripts.bench_lib.contests import Contestant, ContestPlan, run_contest
from scripts.bench_lib.download import (
    DOWNLOAD_HEAD,
    PEER,
    download_rows,
    download_verdicts,
    measure_downloads,
)
from scripts.bench_lib.golden import model_folder
from scripts.bench_lib.measure import StreamsResult, run_bare, run_streams
from scripts.bench_lib.memory import (
    MEMORY_HEAD,
    measure_memory,
    memory_load,
    memory_rows,
    memory_verdicts,
)
from scripts.bench_lib.peers.neighbour import busy_process
from scripts.bench_lib.peers.processes import running_bare, running_mlx_server, running_peer
from scripts.bench_lib.prompts import constrained
from scripts.bench_lib.report.figures import (
    MIN_GRAMMAR_RATIO,
    Verdict,
    rate_verdicts,
    scaling_verdict,
    verdicts,
)
from scripts.bench_lib.report.page import gguf_parts, streams_parts, table
from scripts.bench_lib.rounds import Plan, Results, run, say
from scripts.bench_lib.section import Choices, Facts, Section
from scripts.bench_lib.servers import OURS, BenchError, Load, Server, running_ours
from scripts.bench_lib.turns import measure_turns, turns_table, turns_verdict

SECTIONS = (
    "turns", "mlx", "onnx", "pytorch", "gguf", "neighbour", "agent", "grammar", "memory",
    "download", "catalog",
)  # fmt: skip
# Without a GPU the peer takes an hour for one table with packed weights (0.4 tokens/s).
MLX_KINDS = ("mlx-f32", "mlx-4bit") if sys.platform == "darwin" else ("mlx-f32",)
BOUND = f"{OURS}, bound by a schema"
CONTEXT_TOKENS = 1024
STREAMS = (1, 4, 8)
# Time limit of a section's rounds in seconds, without starts and stops.
BUDGET_S: Mapping[str, float] = {
    "gguf": 400, "neighbour": 120, "agent": 80, "mlx-f32": 200, "mlx-4bit": 70, "onnx": 60,
    "pytorch": 120, "grammar": 90,
}  # fmt: skip
# Without a GPU or a free core, a peer generates only a few tokens per second.
SLOW_TOKENS = 24
MEMORY_MODELS = (
    ("mlx", "mlx-f32"),
    ("safetensors", "hf-f32"),
    ("pytorch", "pytorch"),
    ("onnx", "onnx-f32"),
    ("coreml", "coreml"),
)


def run_section(name: str, choices: Choices) -> list[Section]:
    """Run one section; if it cannot run, return a section with the reason."""
    makers: Mapping[str, Sequence[tuple[str, Callable[[Choices], Section]]]] = {
        "gguf": [("GGUF", _gguf)],
        "neighbour": [("GGUF beside a busy process", _neighbour)],
        "mlx": [(kind, partial(_mlx, kind)) for kind in MLX_KINDS],
        "onnx": [("ONNX", partial(_bare, "onnx", "onnx-f32"))],
        "pytorch": [("PyTorch", partial(_bare, "pytorch", "pytorch"))],
        "grammar": [("Constrained answers", _grammar)],
        "agent": [("Agent conversation", _agent)],
        "memory": [("Memory", _memory)],
        "download": [("Downloads", _download)],
        "catalog": [("Catalog", _catalog)],
        "turns": [("Turns on the accelerator", _turns)],
    }
    sections = []
    for title, make in makers[name]:
        say(f"-- {title}")
        try:
            sections.append(make(choices))
        except BenchError as error:
            say(f"{title}: {error}")
            nothing = ("It could not be measured; see the failures.\n",)
            sections.append(Section(title, nothing, problems=[f"{error}"], is_failed=True))
    return sections


def _gguf(choices: Choices) -> Section:
    sequences = max(*choices.streams, 16)
    load = Load(choices.gguf, choices.threads, choices.context, sequences)
    plan = Plan(
        run_id=secrets.token_hex(4),
        rounds=choices.rounds,
        streams=choices.streams,
        tokens=choices.gguf_tokens,
        agent_rounds=choices.agent_rounds,
        agent_tokens=choices.agent_tokens,
        idle_s=choices.idle_s,
        budget_s=BUDGET_S["gguf"],
        agent_budget_s=BUDGET_S["agent"],
    )
    facts = Facts()
    with ExitStack() as stack:
        servers: list[Server] = []
        if choices.with_ours:
            servers.append(stack.enter_context(running_ours(load)))
        if choices.with_peer:
            peer = stack.enter_context(running_peer(load))
            facts.add(peer.name, peer.facts["version"], peer.facts["system_info"])
            servers.append(peer)
        results = run(plan, servers)
    ours, theirs = results.get(OURS), results.get("llama.cpp")
    return Section(
        "GGUF",
        gguf_parts(results),
        verdicts(ours, theirs, "GGUF: ") if ours else (),
        _problems(results),
        _setup("GGUF", load, plan.tokens, facts),
    )


def _grammar(choices: Choices) -> Section:
    """Compare schema-constrained with unconstrained answers, on our server."""
    counts = (1, max(STREAMS))
    load = Load(choices.gguf, choices.threads, choices.context, max(STREAMS))
    with running_ours(load) as server:

        def bound(bodies: Sequence[dict[str, Any]]) -> StreamsResult:
            return run_streams(server, [constrained(body) for body in bodies])

        contestants = [Contestant(BOUND, counts, bound), _server(server, counts)]
        results = run_contest(_plan("grammar", choices.gguf_tokens, choices), contestants)
    found = rate_verdicts(results[BOUND], results[OURS], "Constrained answers: ", MIN_GRAMMAR_RATIO)
    return Section(
        "Constrained answers",
        streams_parts(results),
        [replace(one, name=one.name.replace("ours / peer", "bound / free")) for one in found],
        _problems(results),
        _setup("Constrained answers", load, choices.gguf_tokens, Facts()),
    )


def _agent(choices: Choices) -> Section:
    load = Load(choices.gguf, choices.threads, choices.context, 4)
    needed = choices.agent_tokens + (TURNS + 2) * (ANSWER_TOKENS + 32)
    if needed > choices.context:
        raise BenchError(
            f"the conversation needs about {needed} tokens of context; raise --context"
        )
    found = measure_agent(
        load,
        secrets.token_hex(4),
        choices.agent_tokens,
        with_ours=choices.with_ours,
        with_peer=choices.with_peer,
    )
    setup = _setup("Agent", load, ANSWER_TOKENS, Facts())
    return Section("Agent conversation", agent_parts(found), agent_verdicts(found), setup=setup)


def _mlx(kind: str, choices: Choices) -> Section:
    load = Load(model_folder(kind, choices), choices.threads, CONTEXT_TOKENS, max(STREAMS), "mlx")
    tokens = choices.tokens if kind == "mlx-f32" else min(choices.tokens, SLOW_TOKENS)
    plan = _plan(kind, tokens, choices)
    return _against(running_mlx_server, load, plan, choices, f"MLX, {kind}")


def _neighbour(choices: Choices) -> Section:
    """Compare with llama.cpp's server while another process keeps one core busy."""
    load = Load(choices.gguf, choices.threads, choices.context, max(STREAMS))
    plan = _plan("neighbour", min(choices.gguf_tokens, SLOW_TOKENS), choices)
    with busy_process():
        return _against(running_peer, load, plan, choices, "GGUF beside a busy process")


def _against(
    running: Callable[[Load], AbstractContextManager[Server]],
    load: Load,
    plan: ContestPlan,
    choices: Choices,
    title: str,
) -> Section:
    """Compare our server with another one; both stay up."""
    facts = Facts()
    with ExitStack() as stack:
        contestants = []
        if choices.with_ours:
            contestants.append(_server(stack.enter_context(running_ours(load)), STREAMS))
        if choices.with_peer:
            peer = stack.enter_context(running(load))
            facts.add(peer.name, peer.facts["version"], peer.facts["system_info"])
            contestants.append(_server(peer, STREAMS))
        results = run_contest(plan, contestants)
    return _contest_section(title, results, _setup(title, load, plan.tokens, facts))


def _bare(format: str, kind: str, choices: Choices) -> Section:
    load = Load(model_folder(kind, choices), choices.threads, CONTEXT_TOKENS, max(STREAMS), format)
    facts = Facts()
    with ExitStack() as stack:
        contestants = []
        if choices.with_ours:
            ours = stack.enter_context(running_ours(load))
            contestants.append(_server(ours, (1, max(STREAMS))))
        if choices.with_peer:
            loop = stack.enter_context(running_bare(load))
            facts.add(loop.name, loop.version)
            contestants.append(
                Contestant(loop.name, (1,), lambda bodies: run_bare(loop, bodies[0]))
            )
        results = run_contest(_plan(format, choices.tokens, choices), contestants)
    title = {"onnx": "ONNX", "pytorch": "PyTorch"}[format]
    setup = _setup(title, load, choices.tokens, facts)
    return _contest_section(title, results, setup, is_scaled=True)


def _memory(choices: Choices) -> Section:
    run_id = secrets.token_hex(4)
    results, problems = [], []
    for format, kind in (("gguf", ""), *MEMORY_MODELS):
        try:
            model = model_folder(kind, choices) if kind else choices.gguf
            result = measure_memory(memory_load(format, model, choices.threads), run_id)
        except (BenchError, ImpetusError) as error:
            say(f"memory, {format}: {error}")
            problems.append(f"{format}: {error}")
            continue
        results.append(result)
        problems += [f"{format}: {text}" for text in result.problems]
    formats = ["gguf", *(format for format, _ in MEMORY_MODELS)]
    found = memory_verdicts(results, formats)
    return Section(
        "Memory",
        [table(MEMORY_HEAD, memory_rows(results))],
        found,
        problems,
        is_failed=len(results) < len(formats),
    )


def _turns(choices: Choices) -> Section:
    if not choices.with_ours:
        return Section("Turns on the accelerator", ("Not measured.\n",))
    result = measure_turns()
    return Section("Turns on the accelerator", [turns_table(result)], [turns_verdict(result)])


def _download(choices: Choices) -> Section:
    names = [OURS] * choices.with_ours + [PEER] * choices.with_peer
    runs = measure_downloads(choices.rounds, names)
    return Section(
        "Downloads", [table(DOWNLOAD_HEAD, download_rows(runs))], download_verdicts(runs)
    )


def _catalog(choices: Choices) -> Section:
    if not choices.with_ours:
        return Section("Catalog", ("Not measured.\n",))
    result = measure_catalog(choices.rounds, choices.idle_s)
    return Section("Catalog", [table(CATALOG_HEAD, catalog_rows(result))], catalog_verdicts(result))


def _server(server: Server, counts: tuple[int, ...]) -> Contestant:
    return Contestant(server.name, counts, partial(run_streams, server))


def _plan(name: str, tokens: int, choices: Choices) -> ContestPlan:
    return ContestPlan(secrets.token_hex(4), choices.rounds, tokens, BUDGET_S[name])


def _contest_section(
    title: str,
    results: dict[str, Results],
    setup: Sequence[tuple[str, str]],
    *,
    is_scaled: bool = False,
) -> Section:
    found: list[Verdict] = []
    peers = [name for name in results if name != OURS]
    if OURS in results and peers:
        ours, peer = results[OURS], results[peers[0]]
        found += rate_verdicts(ours, peer, f"{title}: ")
        if is_scaled:
            found.append(scaling_verdict(ours, peer, f"{title}: "))
    return Section(title, streams_parts(results), found, _problems(results), setup)


def _problems(results: Mapping[str, Results]) -> list[str]:
    return [f"{name}: {text}" for name, result in results.items() for text in result.problems]


def _setup(title: str, load: Load, tokens: int, facts: Facts) -> list[tuple[str, str]]:
    counts = f"{load.threads}, {load.context}, {load.sequences}, {tokens}"
    return [
        (f"{title}: model", load.model.name),
        (f"{title}: threads, context, sequences, answer tokens", counts),
        *facts.pairs,
    ]
