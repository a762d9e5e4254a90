"""Runs a server under eight streams while a file simulates heat, and plots the result.

`python -m scripts.bench_lib.thermal` writes docs/thermal.svg.
"""

import argparse
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from scheduler.thermal import ThermalState, directive
from scripts.bench_lib.client import StreamRecord
from scripts.bench_lib.measure import post
from scripts.bench_lib.prompts import stream_bodies
from scripts.bench_lib.report.plot import Band, Chart, Line, draw
from scripts.bench_lib.rounds import say
from scripts.bench_lib.servers import METRIC, ROOT, BenchError, Load, Server, running_ours
from scripts.bench_lib.starter import starter_model

# Seconds after the start, and the sensor's new state.  A hotter state takes effect after 4 s, a
# cooler one after 30 s.
PHASES = ((0.0, "nominal"), (20.0, "serious"), (45.0, "critical"), (70.0, "nominal"))
# How long each state is in effect; the last one until the streams end.
LASTING_S = (24.0, 25.0, 53.0, 18.0)
STREAMS = 8
TRIAL_TOKENS = 32
SAMPLE_S = 1.0
STATES = ("nominal", "fair", "serious", "critical")
COLORS = {"serious": "#fef3c7", "critical": "#fee2e2"}


@dataclass(slots=True)
class Samples:
    """Samples taken while the streams ran: seconds since the start, and values."""

    used_bytes: list[tuple[float, float]] = field(default_factory=list)
    budget_bytes: list[tuple[float, float]] = field(default_factory=list)
    state: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """The whole run; times are seconds since its start."""

    samples: Samples
    records: Sequence[StreamRecord]
    began_at: float

    @property
    def lost(self) -> list[str]:
        """Reasons of streams that ended unexpectedly."""
        return [
            record.error or f"it ended with {record.finish_reason!r}"
            for record in self.records
            if record.error or record.finish_reason != "length"
        ]

    @property
    def rates(self) -> list[tuple[float, float]]:
        """Pieces of text per second, over all streams."""
        moments = [at - self.began_at for record in self.records for at in record.arrivals]
        counts = Counter(int(moment / SAMPLE_S) for moment in moments)
        last = max(counts, default=0)
        return [((index + 0.5) * SAMPLE_S, counts[index] / SAMPLE_S) for index in range(last + 1)]


def planned_tokens(step_s: float) -> int:
    """Return the answer length that lasts for the run, at `step_s` per step when nominal."""
    steps = 0.0
    for (_, name), lasting_s in zip(PHASES, LASTING_S, strict=True):
        limits = directive(ThermalState[name.upper()], STREAMS, 512).limits
        steps += lasting_s / (step_s + limits.decode_pause_s)
    return int(steps)


def trial_step_s(server: Server) -> float:
    """Return the seconds per step with all streams; also loads the model."""
    post(server, stream_bodies(secrets.token_hex(4), 1, 4))
    records = post(server, stream_bodies(secrets.token_hex(4), STREAMS, TRIAL_TOKENS))
    gaps = [
        (record.arrivals[-1] - record.arrivals[0]) / (len(record.arrivals) - 1)
        for record in records
        if len(record.arrivals) > 1
    ]
    if not gaps:
        raise BenchError("the trial streams returned no text")
    return median(gaps)


def run_through_heat(server: Server, sensor: Path, tokens: int) -> Run:
    """Run the streams while the sensor file changes state; blocks until all have ended."""
    samples, records = Samples(), list[StreamRecord]()
    bodies = stream_bodies(secrets.token_hex(4), STREAMS, tokens)
    # End tokens are banned, so the streams last for the whole run.
    bodies = [{**body, "logit_bias": {"0": -100, "2": -100}} for body in bodies]
    problems: list[BenchError] = []

    def stream() -> None:
        try:
            records.extend(post(server, bodies))
        except BenchError as problem:
            problems.append(problem)

    client = threading.Thread(target=stream, daemon=True)
    began_at = time.monotonic()
    client.start()
    left = list(PHASES)
    while client.is_alive():
        passed = time.monotonic() - began_at
        if left and passed >= left[0][0]:
            _, name = left.pop(0)
            sensor.write_text(name)
            say(f"{passed:5.1f} s: the sensor says {name}")
        _sample(server, passed, samples)
        client.join(SAMPLE_S / 2)
    if problems:
        raise problems[0]
    return Run(samples, records, began_at)


def _sample(server: Server, passed: float, samples: Samples) -> None:
    values = {name: float(value) for name, _, value in METRIC.findall(server.get("/metrics"))}
    for name, kept in (
        ("impetus_memory_used_bytes", samples.used_bytes),
        ("impetus_memory_budget_bytes", samples.budget_bytes),
        ("impetus_thermal_state", samples.state),
    ):
        if name in values:
            kept.append((passed, values[name]))


def picture(run: Run) -> str:
    """Return the run as SVG."""
    end_s = max([second for second, _ in (*run.rates, *run.samples.state)], default=1.0)
    memory = [Line("held", run.samples.used_bytes, is_step=True)]
    states = [(float(level), name) for level, name in enumerate(STATES)]
    return draw(
        f"{STREAMS} streams while the machine gets hot and cools down",
        (
            Chart("tokens per second, all streams", [Line("tokens", run.rates)]),
            Chart("bytes that models hold", memory),
            Chart("thermal state", [Line("state", run.samples.state, is_step=True)], states),
        ),
        _bands(run.samples.state, end_s),
        end_s,
    )


def _bands(states: Sequence[tuple[float, float]], end_s: float) -> list[Band]:
    """Return the time spans with a throttling state."""
    bands: list[Band] = []
    ends = [second for second, _ in states[1:]] + [end_s]
    for (start, level), end in zip(states, ends, strict=True):
        color = COLORS.get(STATES[int(level)]) if level >= 0 else None
        if color is None:
            continue
        if bands and bands[-1].color == color and bands[-1].end == start:
            start = bands.pop().start
        bands.append(Band(start, end, color))
    return bands


def main() -> int:
    """Run the benchmark; return 1 if a stream was lost."""
    parser = argparse.ArgumentParser(prog="scripts.bench_lib.thermal", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF file, alone of its kind in its folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "thermal.svg")
    options = parser.parse_args()
    # Otherwise SIGTERM would leave the server running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    model = options.model or starter_model()
    if model is None:
        parser.error("the starter model is not installed; name one with --model")
    load = Load(model.resolve(), options.threads, 4096, STREAMS)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        sensor = Path(folder) / "thermal"
        sensor.write_text(PHASES[0][1])
        with running_ours(load, {"IMPETUS_THERMAL_FILE": str(sensor)}) as server:
            tokens = planned_tokens(trial_step_s(server))
            say(f"{STREAMS} streams of {tokens} tokens")
            run = run_through_heat(server, sensor, tokens)
    options.output.write_text(picture(run))
    for reason in run.lost:
        say(f"lost a stream: {reason}")
    say(f"{len(run.lost)} of {STREAMS} streams lost; written to {options.output}")
    return int(bool(run.lost))


if __name__ == "__main__":
    sys.exit(main())
