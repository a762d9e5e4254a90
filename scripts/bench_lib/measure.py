"""Runs one load on one server and computes figures from the records."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from scripts.bench_lib.client import Job, StreamRecord
from scripts.bench_lib.peers.processes import BareLoop
from scripts.bench_lib.processes import gateway_cpu_s, is_supported, tree_cpu_s, tree_pss_bytes
from scripts.bench_lib.prompts import first_turn, second_turn
from scripts.bench_lib.servers import ROOT, BenchError, Server, gateway_snapshot


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """Figures of one run of several streams; seconds, tokens per second, µs per token.

    `window_rate` counts only the time in which all streams generate; None if there is none.
    """

    total_rate: float
    window_rate: float | None
    first_token_s: float
    gap_p50_s: float
    gap_p99_s: float
    gateway_us: float | None
    tree_us: float | None
    tokens: int
    prompt_tokens: int
    failed: tuple[str, ...]
    ray_us: float | None = None


@dataclass(frozen=True, slots=True)
class AgentResult:
    """Two turns of a conversation: seconds to the first token, and prompt tokens."""

    first_token_s: tuple[float, float]
    prompt_tokens: tuple[int, int]
    cached_tokens: tuple[int, int]

    @property
    def computed_share(self) -> float:
        """Tokens computed in the second turn, as a share of the first turn's prompt."""
        return (self.prompt_tokens[1] - self.cached_tokens[1]) / self.prompt_tokens[0]


@dataclass(frozen=True, slots=True)
class IdleResult:
    """Memory of the process tree, and its CPU use while idle."""

    pss_bytes: int | None
    cpu_share: float | None


def post(
    server: Server, bodies: Sequence[dict[str, Any]], timeout_s: float = 600.0
) -> list[StreamRecord]:
    """Run all bodies at once from a separate client process."""
    job = Job(
        "127.0.0.1",
        server.port,
        [{**body, "model": server.model} for body in bodies],
        timeout_s,
    )
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_lib.client"],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode != 0:
        *_, reason = ["no error output", *done.stderr.strip().splitlines()]
        raise BenchError(f"the client failed against {server.name}: {reason}")
    return [StreamRecord(**record) for record in json.loads(done.stdout)]


def run_streams(server: Server, bodies: Sequence[dict[str, Any]]) -> StreamsResult:
    """Measure all bodies at once, with the CPU time used."""
    before, tree_before = gateway_snapshot(server), _tree_cpu_s(server)
    records = post(server, bodies)
    tree_after, after = _tree_cpu_s(server), gateway_snapshot(server)
    again = gateway_snapshot(server)
    gateway = gateway_cpu_s(before, after, again) if before and after and again else None
    ray = after.ray_cpu_s - before.ray_cpu_s if before and after else None
    tree = tree_after - tree_before if tree_after is not None and tree_before is not None else None
    return streams_result(records, gateway_s=gateway, ray_s=ray, tree_s=tree)


def streams_result(
    records: Sequence[StreamRecord],
    *,
    gateway_s: float | None = None,
    ray_s: float | None = None,
    tree_s: float | None = None,
) -> StreamsResult:
    """Return the figures of concurrent streams; CPU times are in seconds."""
    good = [record for record in records if not record.error and record.arrivals]
    failed = tuple(record.error or "no text" for record in records if record not in good)
    if not good:
        return StreamsResult(0.0, None, 0.0, 0.0, 0.0, None, None, 0, 0, failed)
    tokens = sum(record.completion_tokens for record in good)
    seconds = max(r.ended_at for r in good) - min(r.sent_at for r in good)
    gaps = [b - a for r in good for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)]
    cuts = quantiles(gaps, n=100) if len(gaps) > 1 else [0.0] * 99

    def per_token(cpu_s: float | None) -> float | None:
        return None if cpu_s is None else cpu_s / tokens * 1e6

    return StreamsResult(
        total_rate=tokens / seconds,
        window_rate=_window_rate(good),
        first_token_s=median(record.arrivals[0] - record.sent_at for record in good),
        gap_p50_s=cuts[49],
        gap_p99_s=cuts[98],
        gateway_us=per_token(gateway_s),
        tree_us=per_token(tree_s),
        tokens=tokens,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        failed=failed,
        ray_us=per_token(ray_s),
    )


def run_bare(loop: BareLoop, body: dict[str, Any]) -> StreamsResult:
    """Measure one request to a bare loop, with the CPU time used."""
    before = tree_cpu_s(loop.child.process.pid) if is_supported() else None
    record = loop.run(body)
    after = tree_cpu_s(loop.child.process.pid) if is_supported() else None
    tree = after - before if after is not None and before is not None else None
    return streams_result([record], tree_s=tree)


def _window_rate(records: Sequence[StreamRecord]) -> float | None:
    start = max(record.arrivals[0] for record in records)
    end = min(record.arrivals[-1] for record in records)
    if end <= start:
        return None
    # A piece of text may contain several tokens; all pieces of a stream count equally.
    tokens = sum(
        sum(start < moment <= end for moment in record.arrivals)
        * (record.completion_tokens / len(record.arrivals))
        for record in records
    )
    return tokens / (end - start)


def run_agent(server: Server, system_text: str, max_tokens: int) -> AgentResult:
    """Measure two turns that share a long prefix."""
    first = first_turn(system_text, max_tokens)
    one = _only(server, first)
    two = _only(server, second_turn(first, one.text))
    return AgentResult(
        (one.arrivals[0] - one.sent_at, two.arrivals[0] - two.sent_at),
        (one.prompt_tokens, two.prompt_tokens),
        (one.cached_tokens or 0, two.cached_tokens or 0),
    )


def count_prompt_tokens(server: Server, system_text: str) -> int:
    """Return the prompt tokens of a conversation with this system text."""
    return _only(server, first_turn(system_text, 2)).prompt_tokens


def run_idle(server: Server, seconds: float) -> IdleResult:
    """Measure an idle server for `seconds`; blocks that long."""
    if not is_supported():
        return IdleResult(None, None)
    before = tree_cpu_s(server.pid)
    time.sleep(seconds)
    after = tree_cpu_s(server.pid)
    return IdleResult(tree_pss_bytes(server.pid), (after - before) / seconds)


def _tree_cpu_s(server: Server) -> float | None:
    return tree_cpu_s(server.pid) if is_supported() else None


def _only(server: Server, body: dict[str, Any]) -> StreamRecord:
    record = post(server, [body])[0]
    if record.error or not record.arrivals:
        raise BenchError(f"{server.name}: {record.error or 'the answer had no text'}")
    return record
