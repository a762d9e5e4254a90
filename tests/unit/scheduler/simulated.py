"""A machine in simulated time that performs the policy's actions and watches its promises."""

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from scheduler.events import (
    Action,
    Drain,
    Event,
    Grant,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Reject,
    Tick,
    Unload,
    Unloaded,
    UnloadWanted,
    Used,
    Wanted,
)
from scheduler.policy import decide
from scheduler.state import HostState, KeepRules, Limits, LoadPlan, ModelUsage, Priority

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Model:
    """What a model takes: bytes, seconds to open and to close.  A job ends with its request."""

    size: int
    load_s: float = 1.0
    unload_s: float = 0.05
    smaller: int | None = None
    fails: int = 0
    is_job: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request: when it comes, for what, how long it runs; it may leave while it waits."""

    at: float
    model_id: str
    run_s: float = 0.1
    priority: Priority = "interactive"
    patience_s: float | None = None


@dataclass(slots=True)
class Held:
    """A model in the simulated memory."""

    size: int
    in_flight: int
    used_at: float
    is_closing: bool = False


@dataclass(slots=True)
class Machine:
    """Runs jobs; `ends` has how each ended, `waits` and `latencies` its seconds."""

    models: Mapping[str, Model]
    budget: int
    limits: Limits = field(default_factory=Limits)
    rules: Mapping[str, KeepRules] = field(default_factory=dict)
    timeout_s: float = 1000.0
    now: float = 0.0
    peak: int = 0
    ends: dict[int, list[str]] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)
    latencies: dict[int, float] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    actions: list[tuple[float, Action]] = field(default_factory=list)
    state: HostState = field(init=False)
    held: dict[str, Held] = field(default_factory=dict)
    opening: dict[str, int] = field(default_factory=dict)
    jobs: Sequence[Job] = ()
    failures: dict[str, int] = field(default_factory=dict)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.state = HostState(self.budget, limits=self.limits, settings=tuple(self.rules.items()))

    def run(self, jobs: Sequence[Job], until: float = 5000.0) -> None:
        """Run until all is quiet."""
        self.jobs = jobs
        for number, job in enumerate(jobs):
            self.ends[number] = []
            self._at(job.at, lambda number=number: self._arrive(number))  # type: ignore[misc]
        while self._due:
            self.now, _, work = heapq.heappop(self._due)
            assert self.now < until, "the machine does not come to rest"
            work()
            assert not [n for n, ends in self.ends.items() if len(ends) > 1]

    def tick(self) -> None:
        """Report and let time count, as the deployment does at intervals."""
        self._report()
        self._send(Tick())
        if self.state.waiting:
            self._at(self.now + POLL_S, self.tick)

    def _at(self, when: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), work))

    def _arrive(self, number: int) -> None:
        job = self.jobs[number]
        model = self.models[job.model_id]
        sizes = [model.size] + ([model.smaller] if model.smaller else [])
        plans = tuple(LoadPlan(size) for size in sizes)
        self._report()
        self._send(Wanted(number, job.model_id, plans, self.now + self.timeout_s, job.priority))
        if job.patience_s is not None:
            self._at(self.now + job.patience_s, lambda: self._leave(number))
        self._at(self.now + POLL_S, self.tick)

    def _leave(self, number: int) -> None:
        if not self.ends[number]:
            self.ends[number].append("left")
            self._send(Left(number))

    def _report(self) -> None:
        usages = tuple(
            ModelUsage(model_id, self.now - held.used_at, held.in_flight)
            for model_id, held in self.held.items()
            if not held.is_closing
        )
        self._send(Used(usages, self.now))

    def _send(self, event: Event) -> None:
        outcome = decide(self.state, event, self.now)
        self.state = outcome.state
        for action in outcome.actions:
            self.actions.append((self.now, action))
            self._perform(action)
        used = sum(held.size for held in self.held.values()) + sum(self.opening.values())
        self.peak = max(self.peak, used)
        assert used <= self.budget
        assert used == self.state.used_bytes

    def _perform(self, action: Action) -> None:
        match action:
            case Load(model_id, plan):
                self._open(model_id, plan)
            case Unload(model_id) | Drain(model_id):
                held = self.held[model_id]
                rules = self.rules.get(model_id, KeepRules())
                assert not rules.is_pinned, "a pinned model is never evicted"
                if self.models[model_id].is_job:
                    assert not held.in_flight, "a job's memory is never asked back"
                if isinstance(action, Unload):
                    assert not held.in_flight, "a busy model is never evicted"
                held.is_closing = True
                self._free_if_idle(model_id)
            case Grant(number, model_id):
                assert not self.held[model_id].is_closing
                self.ends[number].append("granted")
                self.waits[number] = self.now - self.jobs[number].at
                self.held[model_id].in_flight += 1
                run_s = self.jobs[number].run_s
                self._at(self.now + run_s, lambda: self._finish(number, model_id))
            case Reject(number):
                self.ends[number].append(action.kind)

    def _open(self, model_id: str, plan: LoadPlan) -> None:
        assert model_id not in self.held, "one load per model at a time"
        assert model_id not in self.opening, "one load per model at a time"
        self.opening[model_id] = plan.needed_bytes
        self.loads.append(model_id)
        model = self.models[model_id]
        fails = self.failures.get(model_id, 0) < model.fails
        work = self._fail if fails else self._opened
        self._at(self.now + model.load_s, lambda: work(model_id))

    def _fail(self, model_id: str) -> None:
        self.failures[model_id] = self.failures.get(model_id, 0) + 1
        del self.opening[model_id]
        self._send(LoadFailed(model_id, "no memory", is_memory=True))

    def _opened(self, model_id: str) -> None:
        size = self.opening.pop(model_id)
        self.held[model_id] = Held(size, 0, self.now)
        model = self.models[model_id]
        self._send(Loaded(model_id, size, model.load_s, is_job=model.is_job))

    def _finish(self, number: int, model_id: str) -> None:
        self.latencies[number] = self.now - self.jobs[number].at
        held = self.held[model_id]
        held.in_flight -= 1
        held.used_at = self.now
        if held.is_closing:
            self._free_if_idle(model_id)
        elif self.models[model_id].is_job and not held.in_flight:
            self._send(UnloadWanted(model_id, "it has ended"))

    def _free_if_idle(self, model_id: str) -> None:
        if not self.held[model_id].in_flight:
            self._at(self.now + self.models[model_id].unload_s, lambda: self._freed(model_id))

    def _freed(self, model_id: str) -> None:
        del self.held[model_id]
        self._send(Unloaded(model_id))


def first_in_first_out(models: Mapping[str, Model], budget: int, jobs: Sequence[Job]) -> float:
    """Return the mean latency when requests start strictly in the order they came.

    The model unused for longest goes; it is awaited while busy; loads are one after another.
    """
    ends: dict[str, float] = {}
    started, total = 0.0, 0.0
    for job in sorted(jobs, key=lambda job: job.at):
        start = max(started, job.at)
        if job.model_id not in ends:
            need = models[job.model_id].size
            while sum(models[name].size for name in ends) + need > budget:
                oldest = min(ends, key=lambda name: ends[name])
                start = max(start, ends.pop(oldest)) + models[oldest].unload_s
            start += models[job.model_id].load_s
            ends[job.model_id] = start
        started = start
        ends[job.model_id] = max(ends[job.model_id], start + job.run_s)
        total += start + job.run_s - job.at
    return total / len(jobs)
