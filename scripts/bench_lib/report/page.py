"""Renders docs/benchmarks.md."""

from collections.abc import Mapping, Sequence

from core.units import format_bytes
from scripts.bench_lib.measure import IdleResult
from scripts.bench_lib.report.figures import Figure, Verdict, added_first_token_ms, ratios, spread
from scripts.bench_lib.rounds import Results

Row = Sequence[str]

FIGURES: tuple[tuple[str, Figure, int, float], ...] = (
    ("tokens/s, whole run", lambda r: r.total_rate, 1, 1),
    ("tokens/s, while all streams run", lambda r: r.window_rate, 1, 1),
    ("time to first token, ms", lambda r: r.first_token_s, 0, 1000),
    ("inter-token latency p50, ms", lambda r: r.gap_p50_s, 1, 1000),
    ("inter-token latency p99, ms", lambda r: r.gap_p99_s, 1, 1000),
    ("CPU of all processes, µs per token", lambda r: r.tree_us, 0, 1),
    ("gateway CPU, µs per token", lambda r: r.gateway_us, 0, 1),
    ("of it Ray's own timers and threads, µs per token", lambda r: r.ray_us, 0, 1),
)

HOW = """\
## How it is measured
- GGUF: both servers are up during the whole run, with the same file, threads, context and number
  of sequences; only one generates at a time, so each carries the other's idle cost. The order
  alternates from round to round. Ratios are taken round by round, then the median is shown with
  the least and the greatest. The peer runs with its defaults otherwise. Its sequences share the
  given context; Impetus bounds each sequence by it and decides itself how many cells all share, so
  the memory of the two is not that of equal KV caches.
- The client is a process of its own with raw sockets, the same for both. Connections are open
  before the clock starts; the connection's set-up is not part of any figure. Answers are greedy.
  Tokens are counted from `usage`; no two prompts start alike, so no prefix cache helps.
- "Whole run" counts from the first request sent to the last byte received, prompts included.
  "While all streams run" counts from the last stream's first token to the first stream's last.
- Added time to first token: several single requests per round, in pairs, the difference taken
  pair by pair. The time in the table by number of streams comes from the long runs instead.
- Agent conversation: the second turn repeats the first turn's messages, adds the answer and asks
  again. Computed = prompt tokens less `cached_tokens`, as the servers report them.
- The long conversation has ten turns with both servers, one turn of each after the other. Then
  ours computes a prompt that nearly fills the context; the model is unloaded and asked for the
  next turn, and the server is stopped and started on the same data folder and asked for one more.
  Both times hold the model's load. Cold prefill = that prompt's first turn.
- Gateway CPU = CPU time of the router's process and of the process that holds the model, both with
  their children, less what the runtime burnt in it: its own worker threads, and the engine thread's
  time inside native calls, which the server counts (`impetus_engine_native_cpu_seconds_total`).
  Idle cost, garbage collection and everything unclear count as ours; the one reading of `/metrics`
  in between is measured by itself and taken off.
  Ray's own timers and threads = CPU time of the first thread of both processes, where Ray's core
  takes calls and looks for signals every 10 ms, which no setting changes; the rest is ours.
- MLX: the peer is `mlx_lm.server` with its defaults on the same folder; on Linux both compute with
  PyTorch's BLAS in place of the slow one in MLX's wheel. Weights and their types are what each
  makes of the files: without a GPU, Impetus unpacks small quantized models, the peer does not.
- ONNX and PyTorch: the peer is a plain loop in a process of its own, without a server: one
  onnxruntime session that decodes greedily, and transformers' `generate`, with the same file and
  number of threads and otherwise their defaults. It runs one stream, and Impetus's answers to one
  and to eight streams through its API are compared with that.
- Each section says when it was measured; `--only` measures some again and leaves the others as
  they were, which are in `benchmarks.json`. Machine and packages are those of the last run. A
  section runs as many rounds as fit its time, one at least. The first request to
  each loads its model and is not measured.
- Memory: the server runs with one format and a short context, and keeps no prefixes of unloaded
  models, which have a bound of their own; eight streams together fill the estimate's KV tokens,
  and again with other prompts so that kept prefixes fill their part.
  Measured = proportional set size of the process that holds the model, mapped files included, less
  that of the same process without a model (the format `echo`); "peak" is the greatest of readings
  meanwhile. The ratio is that of measured and estimate, which the scheduler's ledger goes by.
- Downloads: the same repository of two large files and ten small ones, from `scripts/hub` in a
  process of its own, by Impetus and by huggingface_hub's `snapshot_download` in turns. Time and CPU
  time count from the start of the process that downloads; Impetus also checks every hash, and that
  the data is on the disk (fsync).
- Catalog: 5,000 files of 3,400 models, GGUF files and folders as transformers writes them, with
  real headers and weights that are holes in sparse files. The first scan inspects each of them;
  later ones run in a process that has just started, and again in the same process. Queries go to
  the application in their process, over 10,000 records. An idle server is measured with the folder
  of 5,000 files and with an empty one; CPU is that of all its processes.
- Turns: one process takes turns on its own, then beside a second one that is registered and idle;
  CPU time of its thread, less an empty loop's. Waiting for another process's step comes on top.
- GGUF beside a busy process: a third process keeps one core busy all the time, as a compiler would.
- Constrained answers: both kinds come from one server of ours, in alternating order; the bound ones
  must be a JSON array of objects for a schema with strings, an integer and an enumeration.
- "CPU of all processes" is each server's whole process tree, the model's work included, divided by
  the tokens of the run; for Impetus it holds Ray's own processes too.
- Memory at rest is the proportional set size of the whole process tree: shared pages are divided
  among their users, so nothing is counted twice.
"""


def render(
    chapters: Sequence[tuple[str, Sequence[str]]],
    verdicts: Sequence[Verdict],
    problems: Sequence[str],
    setup: Sequence[tuple[str, str]],
) -> str:
    """Return the page; a chapter is a title and its text blocks."""
    parts = ["# Benchmarks\n", "Written by `scripts/bench`; do not edit.\n"]
    if verdicts:
        rows = [(v.name, v.target, v.measured, v.word) for v in verdicts]
        parts += ["## Targets\n", table(("what", "target", "measured", ""), rows)]
    for title, blocks in chapters:
        parts += [f"## {title}\n", *blocks]
    if problems:
        lines = [f"- {text.strip()}".replace("\n", "\n  ") for text in problems]
        parts += ["## Failures\n", "\n".join(lines) + "\n"]
    facts = [(what, value.replace("|", "·")) for what, value in setup]
    parts += ["## Machine and load\n", table(("what", "value"), facts), HOW]
    return "\n".join(parts)


def gguf_parts(results: Mapping[str, Results]) -> list[str]:
    """Return the chapter on llama.cpp; without a peer its tables have no ratios."""
    parts = streams_parts(results)
    return parts + _first_token(results) + _agent(results) + _idle(results)


def streams_parts(results: Mapping[str, Results]) -> list[str]:
    """Return a table for each number of streams."""
    parts = ["Median over the rounds (least–greatest).\n"]
    for count in sorted({count for result in results.values() for count in result.streams}):
        parts += [f"### {count} {'stream' if count == 1 else 'streams'}\n"]
        parts += [_streams_table(count, results), _counts(count, results)]
    return parts


def table(head: Row, rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _streams_table(count: int, results: Mapping[str, Results]) -> str:
    """Compare all that ran this number of streams; figures that none has are left out."""
    runs = {name: result.rounds_of(count) for name, result in results.items()}
    runs = {name: rounds for name, rounds in runs.items() if rounds}
    rows = []
    for label, figure, digits, scale in FIGURES:
        found = [spread([figure(each) for each in rounds]) for rounds in runs.values()]
        if not any(found):
            continue
        cells = [value.text(digits, scale) if value else "–" for value in found]
        if len(runs) == 2:
            ours, peer = runs.values()
            ratio = ratios(ours, peer, figure)
            cells.append(ratio.text(3) if ratio else "–")
        rows.append((label, *cells))
    return table(("what", *runs, *(["ours / peer"] if len(runs) == 2 else [])), rows)


def _counts(count: int, results: Mapping[str, Results]) -> str:
    """Return the tokens of each side: ratios are only valid for equal work."""
    texts = [
        f"{name} {sum(r.tokens for r in result.rounds_of(count))} tokens generated from "
        f"{sum(r.prompt_tokens for r in result.rounds_of(count))} prompt tokens in "
        f"{len(result.rounds_of(count))} rounds"
        for name, result in results.items()
        if result.rounds_of(count)
    ]
    return "; ".join(texts) + ".\n"


def _first_token(results: Mapping[str, Results]) -> list[str]:
    names = list(results)
    rows = []
    for name in names:
        found = spread([value for times in results[name].first_token_s for value in times])
        rows.append((name, found.text(1, 1000) if found else "–"))
    if len(names) == 2:
        added = added_first_token_ms(results[names[0]], results[names[1]])
        rows.append(("added, by round", added.text(1) if added else "–"))
    return ["### Time to first token, 1 stream\n", table(("server", "ms"), rows)]


def _agent(results: Mapping[str, Results]) -> list[str]:
    names = list(results)
    rows = []
    for name in names:
        runs = results[name].agent
        if not runs:
            continue
        times = [spread([run.first_token_s[turn] for run in runs]) for turn in (0, 1)]
        share = spread([run.computed_share for run in runs])
        computed = [run.prompt_tokens[1] - run.cached_tokens[1] for run in runs]
        rows.append(
            (
                name,
                str(runs[0].prompt_tokens[0]),
                *(value.text(0, 1000) if value else "–" for value in times),
                ", ".join(map(str, computed)),
                f"{share.text(1, 100)} %" if share else "–",
            )
        )
    head = (
        *("server", "prompt tokens, turn 1", "first token, turn 1, ms", "first token, turn 2, ms"),
        *("computed in turn 2", "share of turn 1"),
    )
    return ["### Agent conversation of two turns\n", table(head, rows)] if rows else []


def _idle(results: Mapping[str, Results]) -> list[str]:
    names = list(results)
    rows = [
        (name, *_idle_cells(results[name].idle_before), *_idle_cells(results[name].idle_after))
        for name in names
    ]
    head = (
        *("server", "memory, model loaded", "CPU at rest", "memory after the load"),
        "CPU at rest after the load",
    )
    return ["### At rest\n", "CPU in percent of one core.\n", table(head, rows)]


def _idle_cells(idle: IdleResult | None) -> tuple[str, str]:
    if idle is None:
        return "–", "–"
    memory = "–" if idle.pss_bytes is None else format_bytes(idle.pss_bytes)
    return memory, "–" if idle.cpu_share is None else f"{idle.cpu_share:.1%}"
