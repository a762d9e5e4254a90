"""Memory ledger of one machine: holds the policy's state and performs its actions."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from core.errors import EngineFailed, ImpetusError, InsufficientMemory, QueueFull, Unavailable
from core.supervision import Supervisor, attempt
from deployments.decisions import DecisionLog
from deployments.messages import Residency, UnloadResult
from deployments.scheduler.formats import UsageReport
from scheduler.events import (
    Action,
    AvailableChanged,
    Configured,
    Drain,
    Event,
    Grant,
    Left,
    Load,
    Loaded,
    LoadFailed,
    ProcessEnded,
    Reject,
    Replaced,
    StrainChanged,
    Tick,
    Unload,
    Unloaded,
    UnloadWanted,
    Used,
    Wanted,
)
from scheduler.policy import decide
from scheduler.state import HostState, KeepRules, LoadPlan, ModelUsage, Priority

logger = logging.getLogger(__name__)

# Poll interval of replicas' usage while requests wait for memory.
_WAITING_POLL_S = 0.1
# Poll interval while only keep-alives run.
_SHORTEST_POLL_S = 0.5
_LONGEST_POLL_S = 15.0
# Poll interval during a load, and under critical strain, to unload models soon after last use.
_STRAIN_POLL_S = 1.0

Opener = Callable[[str, LoadPlan], Awaitable[Residency]]
Closer = Callable[[Residency], Awaitable[UnloadResult]]

Reporter = Callable[[Sequence[Residency]], Awaitable[UsageReport]]


@dataclass(slots=True)
class LoadCounts:
    """Counts of loads, failed loads and evictions since the start."""

    loads: int = 0
    load_failures: int = 0
    evictions: int = 0


def error_for(reject: Reject, failure: BaseException | None) -> BaseException:
    """Return the error of a rejected request; `failure` is what its model's load raised."""
    retry = reject.retry_after_s
    match reject.kind:
        case "memory":
            return InsufficientMemory(reject.reason, param="model", retry_after_s=retry)
        case "full":
            return QueueFull(reject.reason, param="model", retry_after_s=retry)
        case "timeout":
            return Unavailable(reject.reason, param="model", retry_after_s=retry)
        case _:
            return failure or EngineFailed(reject.reason)


class Ledger:
    """Decides with `scheduler.policy`; loads, unloads and asks through the given functions.

    All state changes happen on one event loop, between two awaits.  `supervisor` runs the tasks,
    and cancels them.
    """

    def __init__(
        self,
        state: HostState,
        open_: Opener,
        close: Closer,
        report: Reporter,
        log: DecisionLog,
        supervisor: Supervisor,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called after every event, before control returns to the loop."""
        self._state = state
        self._on_change = on_change
        self._open, self._close, self._report = open_, close, report
        self._residencies: dict[str, Residency] = {}
        self._waiting: dict[int, asyncio.Future[Residency]] = {}
        self._failures: dict[str, BaseException] = {}
        self._unloads: dict[str, asyncio.Task[None]] = {}
        self._supervisor = supervisor
        self._log = log
        self._evicted: dict[str, list[str]] = {}
        self.counts = LoadCounts()
        self._request_ids = itertools.count()
        self._retired = itertools.count(1)
        self._usage_at = -math.inf
        self._wake_up = asyncio.Event()
        self._watch = supervisor.keep_running("memory ledger", self._run)

    @property
    def residencies(self) -> list[Residency]:
        """The models that take requests."""
        return [one for one in self._residencies.values() if not one.is_job]

    @property
    def loading(self) -> list[str]:
        """The ids of the models that are being loaded."""
        return [model.model_id for model in self._state.loading]

    @property
    def state(self) -> HostState:
        """The policy's state."""
        return self._state

    def residency(self, model_id: str) -> Residency | None:
        """Return where the model takes requests; None if it does not."""
        return self._residencies.get(model_id)

    async def acquire(
        self,
        model_id: str,
        plans: tuple[LoadPlan, ...],
        timeout_s: float,
        priority: Priority,
        *,
        is_resumed: bool = False,
    ) -> Residency:
        """Wait until the model is resident; return where.

        Call `take_usage` or `refresh` right before if it is not resident.  Raises
        InsufficientMemory, QueueFull, Unavailable after `timeout_s`, and what the load raised.
        """
        number = next(self._request_ids)
        future: asyncio.Future[Residency] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        deadline = time.monotonic() + timeout_s
        self._send(Wanted(number, model_id, plans, deadline, priority, is_resumed))
        try:
            return await future
        finally:
            if self._waiting.pop(number, None) is not None:
                self._send(Left(number))
            if all(item.model_id != model_id for item in self._state.waiting):
                self._evicted.pop(model_id, None)

    async def release(self, model_id: str, reason: str) -> bool:
        """Unload a model and wait until its memory is free; False if it is not resident."""
        if model_id in self._residencies:
            self._send(UnloadWanted(model_id, reason))
        closing = self._unloads.get(model_id)
        if closing is None:
            return False
        await asyncio.shield(closing)
        return True

    def retire(self, residency: Residency, reason: str) -> None:
        """Free a model's name for another load; its old memory is free after its last request."""
        model_id = residency.model_id
        if self._residencies.get(model_id) is not residency:
            return
        del self._residencies[model_id]
        old_id = f"{model_id} (replaced {next(self._retired)})"
        self._start_unload(old_id, residency)
        self._log.record("replaced", f"drain {model_id}", reason)
        self._send(Replaced(model_id, old_id))

    def restore(self, residency: Residency, size_bytes: int) -> None:
        """Add a model that a replica already holds."""
        self._residencies[residency.model_id] = residency
        self._send(Loaded(residency.model_id, size_bytes, residency.load_s, residency.format))

    def forget(self, residency: Residency) -> None:
        """Remove a model whose process is gone."""
        if self._residencies.get(residency.model_id) is residency:
            del self._residencies[residency.model_id]
            self._send(Unloaded(residency.model_id))

    def process_ended(self, process: str) -> None:
        """Remove a process and the memory that it kept."""
        if any(name == process for name, _ in self._state.kept):
            self._send(ProcessEnded(process))

    async def set_critical(self, *, is_critical: bool) -> None:
        """Enter or leave critical strain: idle models are unloaded, nothing new is loaded."""
        if is_critical != self._state.is_critical:
            await self.refresh()
            self._send(StrainChanged(is_critical))

    def set_available(self, available_bytes: int | None) -> None:
        """Record what other applications leave beside the models; None: unknown."""
        if available_bytes is not None or self._state.ceiling_bytes is not None:
            self._send(AvailableChanged(available_bytes))

    def configure(self, model_id: str, rules: KeepRules) -> None:
        """Set a model's keep rules, for now and later loads."""
        self._send(Configured(model_id, rules))

    def record_usage(self, usage: ModelUsage) -> None:
        """Record the usage of an entry that no replica reports (a job)."""
        self._send(Used((usage,), time.monotonic()))

    async def refresh(self) -> None:
        """Ask the replicas for their models' usage; models that are gone are removed."""
        known = self.residencies
        if not (known or self._state.kept):
            return
        self.take_usage(await self._report(known))

    def take_usage(self, usage: UsageReport) -> None:
        """Record a usage report; models of other machines are ignored."""
        self._usage_at = usage.asked_at
        usages: list[ModelUsage] = []
        for residency, report in usage.models:
            if report is None:
                self.forget(residency)
            elif self._residencies.get(residency.model_id) is residency:
                usages.append(report)
        self._send(Used(tuple(usages), usage.asked_at, usage.kept))

    async def _run(self) -> None:
        """Poll the models' usage while requests wait or a keep-alive runs."""
        ticked_at = time.monotonic()
        while True:
            self._wake_up.clear()
            poll_s = self._poll_s()
            left_s = None if poll_s is None else ticked_at + poll_s - time.monotonic()
            if left_s is None or left_s > 0:
                # An event may shorten the interval.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake_up.wait(), left_s)
                continue
            await attempt(self._poll)
            ticked_at = time.monotonic()

    async def _poll(self) -> None:
        if time.monotonic() - self._usage_at > _WAITING_POLL_S:
            await self.refresh()
        self._send(Tick())

    def _poll_s(self) -> float | None:
        if self._state.waiting:
            # Requests that wait only for a load in progress need no usage of other models.
            is_short = any(not self._state.is_loading(one.model_id) for one in self._state.waiting)
            return _WAITING_POLL_S if is_short else _STRAIN_POLL_S
        ends = [item.keep_alive_s for item in self._state.residents if not item.is_closing]
        alive = [end for end in ends if end is not None]
        if self._state.is_critical and ends:
            return _STRAIN_POLL_S
        return min(max(_SHORTEST_POLL_S, min(alive) / 4), _LONGEST_POLL_S) if alive else None

    def _send(self, event: Event) -> None:
        outcome = decide(self._state, event, time.monotonic())
        self._state = outcome.state
        for action in outcome.actions:
            self._log_decision(event, action)
            self._perform(action)
        self._wake_up.set()
        self._on_change()

    def _log_decision(self, event: Event, action: Action) -> None:
        # Not logged: it happens for every request to a resident model.
        if isinstance(action, Grant) and isinstance(event, Wanted):
            return
        what = f"{type(action).__name__.lower()} {action.model_id}"
        self._log.record(type(event).__name__.lower(), what, action.reason)

    def _perform(self, action: Action) -> None:
        match action:
            case Load(model_id, plan):
                self._supervisor.run_once(f"load of {model_id}", self._load(model_id, plan))
            case Unload(model_id, _, for_model) | Drain(model_id, _, for_model):
                if for_model:
                    self.counts.evictions += 1
                    self._evicted.setdefault(for_model, []).append(model_id)
                # From now on a request for it waits until it is loaded again.
                residency = self._residencies.pop(model_id, None)
                self._start_unload(model_id, residency)
            case Grant(number, model_id):
                future = self._waiting.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(self._residencies[model_id])
            case Reject(number):
                future = self._waiting.pop(number, None)
                if future is not None and not future.done():
                    future.set_exception(error_for(action, self._failures.get(action.model_id)))

    def _start_unload(self, model_id: str, residency: Residency | None) -> None:
        work = self._unload(model_id, residency)
        self._unloads[model_id] = self._supervisor.run_once(f"unload of {model_id}", work)

    async def _load(self, model_id: str, plan: LoadPlan) -> None:
        try:
            residency = await self._open(model_id, plan)
        except Exception as problem:
            if not isinstance(problem, ImpetusError):
                logger.exception("loading %s failed", model_id)
            self._failures[model_id] = problem
            is_memory = isinstance(problem, InsufficientMemory)
            self._send(LoadFailed(model_id, str(problem), is_memory))
            del self._failures[model_id]
            self.counts.load_failures += 1
            self._evicted.pop(model_id, None)
            return
        self.counts.loads += not residency.is_job
        # Only requests that waited for this load learn which models it evicted.
        evicted = tuple(self._evicted.pop(model_id, ()))
        self._residencies[model_id] = replace(residency, evicted=evicted) if evicted else residency
        size_bytes, load_s = plan.needed_bytes, residency.load_s
        self._send(Loaded(model_id, size_bytes, load_s, residency.format, residency.is_job))
        if model_id in self._residencies:
            self._residencies[model_id] = residency

    async def _unload(self, model_id: str, residency: Residency | None) -> None:
        freed = UnloadResult()
        try:
            if residency is not None:
                freed = await self._close(residency)
        except Exception:
            # A dead replica holds no memory: continue as if it was unloaded.
            logger.exception("unloading %s failed", model_id)
        finally:
            self._unloads.pop(model_id, None)
            kept = (
                ((residency.replica_id, freed.kept_bytes),) if residency and freed.is_known else ()
            )
            self._send(Unloaded(model_id, kept))
            if freed.is_known:
                self._log.record("unloaded", f"freed {model_id}", freed.summary)
