"""A section of the benchmark: its options and its results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench_lib.report.figures import Verdict


@dataclass(frozen=True, slots=True)
class Choices:
    """The command line's options."""

    gguf: Path
    golden: Path | None
    threads: int
    context: int
    streams: tuple[int, ...]
    rounds: int
    gguf_tokens: int
    tokens: int
    agent_rounds: int
    agent_tokens: int
    idle_s: float
    with_ours: bool
    with_peer: bool


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page; `setup` are (name, value) pairs."""

    title: str
    parts: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    problems: Sequence[str] = ()
    setup: Sequence[tuple[str, str]] = ()
    is_failed: bool = False


@dataclass(slots=True)
class Facts:
    """Facts that the peers report about themselves at start."""

    pairs: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, version: str, more: str = "") -> None:
        """Record the facts that a peer reports."""
        self.pairs.append((f"{name} (peer)", f"{version}: {more}" if more else version))
