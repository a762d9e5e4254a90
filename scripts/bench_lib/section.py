"""One part of the benchmark: what is chosen for it, and what it has to show."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench_lib.report.figures import Verdict


@dataclass(frozen=True, slots=True)
class Choices:
    """The command line: which models, how much of each, and which side."""

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
    """One chapter of the page; `setup` are pairs of what and value."""

    title: str
    parts: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    problems: Sequence[str] = ()
    setup: Sequence[tuple[str, str]] = ()
    is_failed: bool = False


@dataclass(slots=True)
class Facts:
    """What the peers say of themselves, collected while they start."""

    pairs: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, version: str, more: str = "") -> None:
        """Note what a peer says of itself."""
        self.pairs.append((f"{name} (peer)", f"{version}: {more}" if more else version))
