"""Compares each format's memory estimate with the measured memory of its filled process."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from backends.base import MemoryEstimate, ModelInfo
from backends.registry import backends_for
from core.errors import NotThisFormat
from core.settings import Settings
from core.units import GIB, format_bytes
from deployments.options import engine_options
from scripts.bench_lib.measure import post
from scripts.bench_lib.processes import (
    ProcessMemory,
    is_supported,
    process_memory,
)
from scripts.bench_lib.prompts import agent_system_text, first_turn
from scripts.bench_lib.report.figures import Verdict
from scripts.bench_lib.rounds import say
from scripts.bench_lib.servers import BenchError, Load, Server, model_id, process_ids, running_ours

LEAST_RATIO = 0.8
GREATEST_RATIO = 1.2
STREAMS = 8
CONTEXT_TOKENS = 1024
# Set explicitly, so the estimate here and the server's own have the same limit.
BUDGET_BYTES = 6 * GIB
ANSWER_TOKENS = 24
# Margin for the chat template and for varying characters per token.
SPARE_TOKENS = 24
CALIBRATION_CHARACTERS = 1000
WAVE_LIMIT_S = 90.0
MOST_WAVES = 3
READING_PAUSE_S = 0.25
# A format without weights: its process equals the others' before a load.
EMPTY_FORMAT = "echo"


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """One format's estimate, its filled process, and a process without a model.

    `peak_bytes` is the maximum PSS while the streams ran; None if it cannot be read.
    """

    format: str
    estimate: MemoryEstimate
    filled: ProcessMemory | None = None
    empty: ProcessMemory | None = None
    peak_bytes: int = 0
    tokens: int = 0
    problems: tuple[str, ...] = ()

    @property
    def measured_bytes(self) -> int | None:
        """The model's memory: PSS of its process less that of a process without a model."""
        if self.filled is None or self.empty is None:
            return None
        return self.filled.pss_bytes - self.empty.pss_bytes

    @property
    def ratio(self) -> float | None:
        """Measured memory divided by the estimate."""
        measured = self.measured_bytes
        return None if measured is None else measured / self.estimate.total_bytes


def measure_memory(load: Load, run_id: str) -> MemoryResult:
    """Start the server with one format, fill the model's KV cache, and read its process.

    Raises BenchError.
    """
    estimate = estimate_of(load)
    if not is_supported():
        return MemoryResult(load.format, estimate)
    settings = {
        "IMPETUS_FORMATS": f"{load.format},{EMPTY_FORMAT}",
        "IMPETUS_MEMORY_BUDGET": str(BUDGET_BYTES),
        # Prefixes outside the engine have their own limits and are not in the estimate.
        "IMPETUS_PREFIX_RAM": "0",
        "IMPETUS_PREFIX_DISK": "0",
    }
    with running_ours(load, settings) as server:
        result = _fill(server, load, estimate, run_id)
    measured = result.measured_bytes
    say(
        f"memory, {load.format}: {format_bytes(measured or 0)} measured, "
        f"{format_bytes(estimate.total_bytes)} estimated"
    )
    return result


def memory_load(format: str, model: Path, threads: int) -> Load:
    """Return the server's load for one format."""
    return Load(model, threads, CONTEXT_TOKENS, STREAMS, format)


def estimate_of(load: Load) -> MemoryEstimate:
    """Return the server's own estimate under `load`.  Raises BenchError."""
    backend = backends_for([load.format])[load.format]
    # Built without the environment, as the server is started.
    settings = Settings.model_construct(
        context_length=load.context, max_sequences=load.sequences, threads=load.threads
    )
    return backend.estimate(_identify(load), engine_options(settings, BUDGET_BYTES))


def _identify(load: Load) -> ModelInfo:
    backend = backends_for([load.format])[load.format]
    paths = sorted(load.model.rglob("*")) if load.model.is_dir() else [load.model]
    for path in paths:
        if path.is_file():
            try:
                return backend.identify(path)
            except NotThisFormat:
                continue
    raise BenchError(f"{load.model} holds no {load.format} model")


def _fill(server: Server, load: Load, estimate: MemoryEstimate, run_id: str) -> MemoryResult:
    characters_per_token = _calibrate(server, run_id)
    pids = process_ids(server)
    pid, empty_pid = pids.get(load.format), pids.get(EMPTY_FORMAT)
    if pid is None or empty_pid is None:
        raise BenchError(f"the processes of {load.format} and {EMPTY_FORMAT} were not found")
    tokens = prompt_tokens(estimate)
    done = 0
    problems: list[str] = []
    with _watching(pid) as peaks:
        for wave in range(waves(estimate)):
            bodies = [
                first_turn(
                    agent_system_text(
                        f"{run_id} {wave} {stream}", int(tokens * characters_per_token)
                    ),
                    ANSWER_TOKENS,
                )
                for stream in range(STREAMS)
            ]
            records = post(server, bodies, WAVE_LIMIT_S)
            done += sum(each.prompt_tokens + each.completion_tokens for each in records)
            problems += [each.error for each in records if each.error]
    return MemoryResult(
        load.format,
        estimate,
        process_memory(pid),
        process_memory(empty_pid),
        max(peaks, default=0),
        done,
        tuple(problems),
    )


def prompt_tokens(estimate: MemoryEstimate) -> int:
    """Return the prompt length with which all streams together fill the KV tokens."""
    share = min(estimate.kv_tokens // STREAMS, estimate.context_tokens)
    return max(share - ANSWER_TOKENS - SPARE_TOKENS, 1)


def waves(estimate: MemoryEstimate) -> int:
    """Return how often to fill the KV tokens until the memory for prefixes is full too."""
    if not estimate.kv_bytes:
        return 1
    return min(1 + -(-estimate.prefix_bytes // estimate.kv_bytes), MOST_WAVES)


def _calibrate(server: Server, run_id: str) -> float:
    """Load the model and the empty format; return the characters per token."""
    body = first_turn(agent_system_text(f"{run_id} first", CALIBRATION_CHARACTERS), 2)
    empty = replace(server, format=EMPTY_FORMAT)
    for each in (replace(empty, model=model_id(empty)), server):
        record = post(each, [body])[0]
        if record.error:
            raise BenchError(f"{each.name}, {each.format}: {record.error}")
    return CALIBRATION_CHARACTERS / record.prompt_tokens


@contextmanager
def _watching(pid: int) -> Iterator[list[int]]:
    """Sample the PSS of a process until the block ends."""
    found: list[int] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(READING_PAUSE_S):
            try:
                found.append(process_memory(pid).pss_bytes)
            except OSError:
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def memory_verdicts(results: Sequence[MemoryResult], formats: Sequence[str]) -> list[Verdict]:
    """Compare the measurements with the estimates; formats without a result are not measured."""
    known = {result.format: result for result in results}
    return [_verdict(format, known.get(format)) for format in formats]


def _verdict(format: str, result: MemoryResult | None) -> Verdict:
    measured, is_reached = "–", None
    if result is not None and result.ratio is not None:
        measured = _ratio_text(result) + (" with failed streams" if result.problems else "")
        is_reached = LEAST_RATIO <= result.ratio <= GREATEST_RATIO and not result.problems
    target = f"{LEAST_RATIO}–{GREATEST_RATIO}"
    return Verdict(f"memory, {format}: measured / estimate", target, measured, is_reached)


def _ratio_text(result: MemoryResult) -> str:
    return "–" if result.ratio is None else f"{result.ratio:.3f}"


def memory_rows(results: Sequence[MemoryResult]) -> list[tuple[str, ...]]:
    """Return the table's rows, without the header."""
    rows = []
    for result in results:
        estimate, filled, empty = result.estimate, result.filled, result.empty
        parts = (
            *(estimate.weights_bytes, estimate.kv_bytes),
            *(estimate.transient_bytes, estimate.prefix_bytes, estimate.total_bytes),
        )
        read = ("–",) * 4
        if filled is not None and empty is not None:
            read = (
                format_bytes(empty.pss_bytes),
                format_bytes(filled.pss_bytes - empty.pss_bytes),
                format_bytes(filled.private_bytes - empty.private_bytes),
                format_bytes(max(result.peak_bytes, filled.pss_bytes) - empty.pss_bytes),
            )
        rows.append((result.format, *map(format_bytes, parts), *read, _ratio_text(result)))
    return rows


MEMORY_HEAD = (
    *("format", "weights", "KV cache", "transient", "prefixes", "estimate"),
    *("process without a model", "measured", "of it private", "peak", "measured / estimate"),
)
