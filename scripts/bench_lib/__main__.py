"""Command line of the benchmark, `scripts/bench`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from core.cpus import usable_cpus
from scripts.bench_lib.report import machine
from scripts.bench_lib.report.kept import Kept, kept_text, merged, read_kept
from scripts.bench_lib.report.page import render
from scripts.bench_lib.rounds import AGENT_ANSWER_TOKENS
from scripts.bench_lib.section import Choices, Section
from scripts.bench_lib.sections import SECTIONS, run_section
from scripts.bench_lib.servers import ROOT
from scripts.bench_lib.starter import starter_model

PROMPT_TOKENS = 100


def main() -> int:
    """Run the sections; return 1 if one cannot run or, with `--strict`, a target is missed."""
    parser = _parser()
    options = parser.parse_args()
    choices = _choices(parser, options)
    # Otherwise SIGTERM would leave the servers running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Read once: before a later section it would include the load of the earlier one.
    load_average = machine.load_average()
    sys.stderr.write(f"load average: {load_average}\n")
    new = [
        Kept(name, machine.date(), choices.rounds, load_average, section, machine.python())
        for name in options.only
        for section in run_section(name, choices)
    ]
    store = options.output.with_suffix(".json")
    known = merged(read_kept(store, SECTIONS), new, SECTIONS)
    _write(store, kept_text(known))
    _write(options.output, _page(known))
    sections = [kept.section for kept in new]
    return _summarize(sections, options.output, is_strict=options.strict)


def _page(known: Sequence[Kept]) -> str:
    setup = [*(pair for kept in known for pair in kept.section.setup), *machine.describe()]
    return render(
        [(kept.section.title, kept.parts) for kept in known],
        [verdict for kept in known for verdict in kept.section.verdicts],
        [f"{kept.section.title}: {text}" for kept in known for text in kept.section.problems],
        setup,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--only",
        type=_sections,
        default=SECTIONS,
        help=f"some of {','.join(SECTIONS)}; the others keep their last results",
    )
    parser.add_argument(
        "--side", choices=("ours", "peer"), help="run only our server or only the peer"
    )
    parser.add_argument("--model", type=Path, help="GGUF file, alone of its kind in its folder")
    parser.add_argument(
        "--golden", type=Path, help="folder of models in the other formats (default: build them)"
    )
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument(
        "--context", type=int, default=8192, help="context tokens, shared by all sequences"
    )
    parser.add_argument(
        "--streams", type=_counts, default="1,4,8,16", help="concurrent streams of the GGUF section"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="maximum rounds; fewer if time runs out"
    )
    parser.add_argument("--tokens", type=int, help="maximum tokens per answer")
    parser.add_argument("--agent-rounds", type=int, default=3, help="maximum rounds")
    parser.add_argument(
        "--agent-tokens", type=int, default=5000, help="prompt tokens of the agent's first turn"
    )
    parser.add_argument(
        "--idle-s", type=float, default=5.0, help="seconds to measure the idle server"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _sections(text: str) -> tuple[str, ...]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no such section: {', '.join(unknown)}; use {', '.join(SECTIONS)}"
        )
    return tuple(name for name in SECTIONS if name in names)


def _counts(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError("stream counts must be at least 1")
    return values


def _choices(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Choices:
    model = options.model or starter_model()
    if model is None:
        parser.error("the starter model is not installed; name one with --model")
    model = model.resolve()
    if not model.is_file():
        parser.error(f"no such file: {model}; name a GGUF file with --model")
    choices = Choices(
        gguf=model,
        golden=options.golden,
        threads=options.threads,
        context=options.context,
        streams=options.streams,
        rounds=options.rounds,
        gguf_tokens=128 if options.tokens is None else options.tokens,
        tokens=64 if options.tokens is None else options.tokens,
        agent_rounds=options.agent_rounds,
        agent_tokens=options.agent_tokens,
        idle_s=options.idle_s,
        with_ours=options.side != "peer",
        with_peer=options.side != "ours",
    )
    if min(choices.threads, choices.rounds, choices.tokens) < 1 or choices.idle_s <= 0:
        parser.error("threads, rounds, tokens and idle seconds must be positive")
    needed = max(choices.streams) * (choices.gguf_tokens + PROMPT_TOKENS)
    if needed > choices.context:
        parser.error(f"the streams need about {needed} tokens of context; raise --context")
    if choices.agent_rounds and choices.agent_tokens + 4 * AGENT_ANSWER_TOKENS > choices.context:
        parser.error("the agent's conversation exceeds the context; reduce --agent-tokens")
    return choices


def _write(path: Path, text: str) -> None:
    """Replace a file atomically; an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _summarize(sections: Sequence[Section], output: Path, *, is_strict: bool) -> int:
    reached = [verdict for section in sections for verdict in section.verdicts]
    for verdict in reached:
        print(f"{verdict.word:<13}{verdict.name}: {verdict.measured}; target {verdict.target}")
    for section in sections:
        for problem in section.problems:
            print(f"failed       {section.title}: {problem}")
    print(f"Written to {output}.")
    is_missed = is_strict and any(verdict.is_reached is not True for verdict in reached)
    return int(is_missed or any(section.is_failed for section in sections))


if __name__ == "__main__":
    sys.exit(main())
