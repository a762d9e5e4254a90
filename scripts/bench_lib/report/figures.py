"""Medians with spread, ratios per pair of rounds, and verdicts against targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from scripts.bench_lib.measure import StreamsResult
from scripts.bench_lib.rounds import Results

MIN_RATE_RATIO = 0.95
# Grammar-constrained against unconstrained answers.
MIN_GRAMMAR_RATIO = 0.9
# Eight concurrent streams against one stream of a bare loop.
MIN_SCALING = 3.0
SCALED_STREAMS = 8
MAX_ADDED_FIRST_TOKEN_MS = 5.0
MAX_COMPUTED_SHARE = 0.05
MAX_GATEWAY_US = 300.0
GATEWAY_STREAMS = 8

Figure = Callable[[StreamsResult], float | None]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum over the rounds."""

    median: float
    low: float
    high: float

    def text(self, digits: int, scale: float = 1.0) -> str:
        """Return `median (low–high)`, each times `scale`."""
        middle, low, high = (f"{v * scale:.{digits}f}" for v in (self.median, self.low, self.high))
        return f"{middle} ({low}–{high})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, its measurement, and whether it was reached; None if not measured."""

    name: str
    target: str
    measured: str
    is_reached: bool | None

    @property
    def word(self) -> str:
        """PASS, MISS or NOT MEASURED."""
        return {True: "PASS", False: "MISS", None: "NOT MEASURED"}[self.is_reached]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return the spread of the values, or None if there are none."""
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known)) if known else None


def ratios(
    ours: Sequence[StreamsResult], peer: Sequence[StreamsResult], figure: Figure
) -> Spread | None:
    """Return the ratios ours/peer by round, so both values of a pair saw the same machine.

    Rounds in which a stream of the peer failed are left out.
    """
    pairs = [(figure(a), figure(b)) for a, b in zip(ours, peer, strict=True) if not b.failed]
    return spread([a / b if a is not None and b else None for a, b in pairs])


def added_first_token_ms(ours: Results, peer: Results) -> Spread | None:
    """Return by round how much later our first token arrives than the peer's, in ms."""
    rounds = zip(ours.first_token_s, peer.first_token_s, strict=True)
    return spread([median(1000 * (a - b) for a, b in zip(*pair, strict=True)) for pair in rounds])


def verdicts(ours: Results, peer: Results | None, label: str = "") -> list[Verdict]:
    """Compare the medians with the targets; ratios need the peer."""
    found: list[Verdict] = []
    if peer is not None:
        found += rate_verdicts(ours, peer, label)
        found.append(_first_token_verdict(ours, peer))
    found.append(_agent_verdict(ours))
    if ours.rounds_of(GATEWAY_STREAMS):
        found.append(_gateway_verdict(ours))
    return [replace(verdict, name=label + verdict.name.removeprefix(label)) for verdict in found]


def rate_verdicts(
    ours: Results, peer: Results, label: str, least: float = MIN_RATE_RATIO
) -> list[Verdict]:
    """Compare tokens per second with the peer's, for each number of streams that both ran."""
    return [
        _ratio_verdict(
            f"{label}tokens/s, {count} {'stream' if count == 1 else 'streams'}, ours / peer",
            least,
            ours.rounds_of(count),
            peer.rounds_of(count),
        )
        for count in sorted(ours.streams.keys() & peer.streams.keys())
    ]


def scaling_verdict(ours: Results, peer: Results, label: str) -> Verdict:
    """Compare ours at many streams with the peer at one."""
    return _ratio_verdict(
        f"{label}tokens/s, ours at {SCALED_STREAMS} streams / peer at 1",
        MIN_SCALING,
        ours.rounds_of(SCALED_STREAMS),
        peer.rounds_of(1),
    )


def _ratio_verdict(
    name: str, least: float, ours: Sequence[StreamsResult], peer: Sequence[StreamsResult]
) -> Verdict:
    total = ratios(ours, peer, lambda r: r.total_rate)
    window = ratios(ours, peer, lambda r: r.window_rate)
    known = [value.median for value in (total, window) if value is not None]
    has_failed = any(result.failed for result in ours)
    return Verdict(
        name,
        f"≥ {least}, whole run and while all streams run",
        " and ".join(value.text(3) if value else "–" for value in (total, window))
        + (" with failed streams" if has_failed else ""),
        min(known) >= least and not has_failed if known else None,
    )


def _first_token_verdict(ours: Results, peer: Results) -> Verdict:
    added = added_first_token_ms(ours, peer)
    return Verdict(
        "added time to first token, 1 stream",
        f"≤ {MAX_ADDED_FIRST_TOKEN_MS:.0f} ms",
        f"{added.text(1)} ms" if added else "–",
        added.median <= MAX_ADDED_FIRST_TOKEN_MS if added else None,
    )


def _agent_verdict(ours: Results) -> Verdict:
    share = spread([result.computed_share for result in ours.agent])
    return Verdict(
        "second turn: computed share of the first turn's prompt",
        f"≤ {MAX_COMPUTED_SHARE:.0%}",
        f"{share.text(1, 100)} %" if share else "–",
        share.median <= MAX_COMPUTED_SHARE if share else None,
    )


def _gateway_verdict(ours: Results) -> Verdict:
    cost = spread([result.gateway_us for result in ours.streams[GATEWAY_STREAMS]])
    return Verdict(
        f"gateway CPU per token, {GATEWAY_STREAMS} streams",
        f"≤ {MAX_GATEWAY_US:.0f} µs",
        f"{cost.text(0)} µs" if cost else "–",
        cost.median <= MAX_GATEWAY_US if cost else None,
    )
