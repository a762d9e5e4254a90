"""Scheduler deployment: the single owner of the memory ledgers, loads and unloads."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from backends.registry import backends_for
from catalog.models import ModelRecord, ModelSettings
from catalog.store import CatalogStore
from core.awake_time import AwakeTimeout
from core.errors import ModelNotFound, Unavailable
from core.gpu_failures import gpu_failures
from core.settings import Settings
from core.supervision import Supervisor
from deployments.activity import DeathRecords
from deployments.decisions import DecisionLog
from deployments.messages import (
    DEFAULT_CONTEXT,
    BinEntry,
    Decision,
    LoadContext,
    MachineState,
    MemoryLease,
    MemoryPreview,
    ModelStates,
    NodeMemory,
    Residency,
    SchedulerSnapshot,
)
from deployments.options import budget_bytes, engine_options
from deployments.scheduler.deaths import ProcessDeaths
from deployments.scheduler.deletions import Deletions
from deployments.scheduler.faults import FaultFile, Faults
from deployments.scheduler.formats import FormatClients
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.load_plans import LoadPlanner
from deployments.scheduler.lookup import ModelLookup
from deployments.scheduler.model_loader import ModelLoader
from deployments.scheduler.nodes import Ledgers, ledger_holding, ledger_of, residency_of
from deployments.scheduler.published_states import PublishedStates
from deployments.scheduler.publisher import Publisher
from deployments.scheduler.recovery import Recovery
from deployments.scheduler.reservations import Reservations
from deployments.scheduler.scanning import Scanner
from deployments.scheduler.snapshot import machine_state, take_snapshot
from deployments.scheduler.thermal import ThermalWatch
from deployments.serve.broadcast import broadcast_handles
from deployments.serve.handles import Handle, returning_errors
from deployments.serve.status import existing_replicas, own_node_id, running_deployments
from deployments.serve.worker import prepare_worker
from scheduler.state import HostState, KeepRules, Limits, LoadPlan
from scheduler.thermal import Directive

logger = logging.getLogger(__name__)

_STATES_LIMIT_S = 10.0
# What repeats every few seconds and is silent for longer hangs.
_SILENCE_S = 60.0


class SchedulerReplica:
    """Decides with `scheduler.policy`, performs through the format deployments' handles.

    All state changes happen on one event loop.  At start it asks the replicas what is resident,
    so a crash of the scheduler loses nothing.
    """

    def __init__(
        self,
        settings: Settings,
        formats: Mapping[str, Handle],
        running: Callable[[], Awaitable[frozenset[str]]] = running_deployments,
        replicas: Callable[[], Awaitable[frozenset[str]]] = existing_replicas,
    ) -> None:
        prepare_worker()
        self._settings = settings
        formats = broadcast_handles(formats, settings)
        self._backends = backends_for(list(formats))
        self._machine = PublishedStates(self._machine_state)
        self._log = DecisionLog(on_record=lambda _: self._machine.notify())
        for notice in gpu_failures():
            self._log.record("start", "look for failures of the GPU", notice)
        self._budget_bytes = budget_bytes(settings)
        self._options = engine_options(settings, self._budget_bytes)
        self._planner = LoadPlanner(settings, self._backends, self._options)
        self._store = CatalogStore(settings.catalog_file)
        self._format_clients = FormatClients(formats, self._backends, running)
        self._reservations, self._supervisor = Reservations(), Supervisor()
        self._pauses_jobs = False
        self._published = PublishedStates(self._model_states, lambda: self._faults.expires_in_s())
        self._catalog_version = 0
        self._scanner = Scanner(
            settings,
            self._store,
            self._backends,
            self._supervisor,
            on_change=self._catalog_changed,
        )
        self._node_id = own_node_id()
        fault_file = FaultFile(settings.home / "faults.json", self._node_id)
        self._faults = Faults(fault_file, on_change=self._published.notify)
        self._lookup = ModelLookup(self._store, self._planner, self._scanner.rescan)
        self._deaths = ProcessDeaths(
            DeathRecords(settings.home),
            lambda: self._ledgers.values(),
            self._release_lost,
            self._lookup,
            self._format_clients,
            self._faults,
            self._log,
            replicas,
        )
        self._loader = ModelLoader(
            self._lookup,
            self._planner,
            self._format_clients,
            self._faults,
            self._scanner.scan,
            self._deaths.died,
        )
        self._ledger = self._make_ledger(self._budget_bytes)
        self._ledgers: Ledgers = {self._node_id: self._ledger}
        self._thermal = ThermalWatch(
            settings, formats, running=running, on_directive=self._apply_directive, log=self._log
        )
        self._snapshot = partial(take_snapshot, self._ledger, self._thermal)
        idle_s = settings.format_idle_s
        publisher = Publisher(self._backends, self._snapshot, self._ledger.refresh, idle_s)
        self._deletions = Deletions(
            settings,
            self._store,
            lambda: list(self._ledgers.values()),
            self._release,
            self._reservations.is_used,
            self._scanner.scan,
        )
        self._recovery = Recovery(
            self._scanner,
            self._lookup,
            self._planner,
            self._format_clients,
            self._ledger_of,
            self._residency,
        )
        keep_running = self._supervisor.keep_running
        watched = replace(self._supervisor.policy, silence_s=_SILENCE_S)
        optional = replace(self._supervisor.policy, is_vital=False)
        self._background = asyncio.gather(
            keep_running("folder scans", self._scanner.run),
            keep_running("folder watch", self._scanner.watch, optional),
            keep_running("thermal watch", self._thermal.run, watched),
            keep_running("publisher", publisher.run, watched),
            keep_running("memory leases", lambda: self._reservations.run(self._ledger), watched),
            *self._recovery.start(self._supervisor, list(self._backends), self._prepare),
            return_exceptions=True,
        )

    def _make_ledger(self, budget_bytes: int) -> Ledger:
        """Return the ledger of one machine."""
        defaults = KeepRules(keep_alive_s=self._settings.keep_alive_s)
        limits = Limits(waiting_per_model=self._settings.max_waiting)
        return Ledger(
            HostState(budget_bytes, defaults=defaults, limits=limits),
            self._reservations.wrap_open(partial(self._loader.load, budget_bytes)),
            self._reservations.wrap_close(self._format_clients.close),
            self._format_clients.report,
            self._log,
            self._supervisor,
            self._notify,
        )

    def _notify(self) -> None:
        """Let those who wait for the model states, or for the machine's, look at them."""
        self._published.notify()
        self._machine.notify()

    def _catalog_changed(self) -> None:
        self._catalog_version += 1
        self._published.notify()

    async def _prepare(self) -> None:
        """Restore the models' settings."""
        for record in await self._lookup.records():
            if record.settings != ModelSettings():
                self._configure(record)

    def _ledger_of(self, node: NodeMemory) -> Ledger:
        return ledger_of(self._ledgers, node, self._node_id, self._make_ledger)

    def _residency(self, model_id: str) -> Residency | None:
        return residency_of(self._ledgers, model_id)

    def _residencies(self) -> list[Residency]:
        return [one for ledger in self._ledgers.values() for one in ledger.residencies]

    def _loading(self) -> list[str]:
        return [model_id for ledger in self._ledgers.values() for model_id in ledger.loading]

    def _unloading(self) -> list[str]:
        states = [ledger.state for ledger in self._ledgers.values()]
        closing = [one for state in states for one in state.residents if one.is_closing]
        return [one.model_id for one in closing if not one.is_job]

    def _configure(self, record: ModelRecord) -> None:
        for ledger in self._ledgers.values():
            ledger.configure(record.id, self._planner.keep_rules(record))

    async def _release(self, model_id: str, reason: str) -> bool:
        ledger = ledger_holding(self._ledgers, model_id)
        return ledger is not None and await ledger.release(model_id, reason)

    async def is_ready(self) -> bool:
        """Whether the first scan is done and the formats' processes have answered."""
        return self._recovery.is_done.is_set()

    async def not_ready_because(self) -> str:
        """Return why requests cannot be served now; empty if they can."""
        if not self._scanner.has_scanned:
            if self._scanner.problem:
                return f"The model folders could not be scanned: {self._scanner.problem}"
            return "The model folders are being scanned."
        if not self._recovery.is_done.is_set():
            return self._recovery.problem(self._supervisor.parts())
        return " ".join(self._supervisor.problems())

    async def check_health(self) -> None:
        """Raise Unavailable if a background task keeps failing: Serve replaces this process."""
        self._supervisor.check_health()

    async def rescan(self, urgent: str = "") -> None:
        """Scan for an unknown name, with pauses in between; see `Scanner.rescan`."""
        await self._scanner.rescan(urgent)

    async def _forget_stopped(self) -> None:
        """Remove the models of processes that are gone: scaled to zero, or dead while idle."""
        for residency in await self._format_clients.stopped(self._residencies()):
            logger.info("%s was unloaded: its idle process was scaled down", residency.model_id)
            ledger = ledger_holding(self._ledgers, residency.model_id)
            if ledger is not None:
                ledger.forget(residency)
        await self._deaths.forget_gone()

    @returning_errors
    async def explain(self, model_id: str) -> None:
        """Raise why a model cannot run here; return if it can."""
        await self._lookup.explain(model_id)

    @returning_errors
    async def ensure_loaded(
        self, model_id: str, context: LoadContext = DEFAULT_CONTEXT
    ) -> Residency:
        """Return the model's residency; waits for memory and loads the model if needed.

        Raises ModelNotFound, ModelFileMissing, BrokenModel, BackendUnavailable, ModelFailed,
        ModelQuarantined, InsufficientMemory, QueueFull, and Unavailable if the memory
        does not become free in time.  After a start it waits until it knows what is resident.
        """
        if context.lost_replica or self._residency(model_id) is None:
            await self._wait_until_asked()
        if context.is_retry:
            self._faults.clear(model_id)
        if context.lost_replica:
            await self._check_lost(model_id, context)
        plans: tuple[LoadPlan, ...] = ()
        priority, ledger = context.priority, self._ledger
        if self._residency(model_id) is None:
            if not context.is_resumed:
                self._thermal.check_admits(model_id)
            record = await self._lookup.loadable(model_id)
            self._faults.check(model_id, record.fingerprint)
            ledger = await self._ledger_for(record)
            plans = await self._lookup.plans(record, ledger.state.budget_bytes)
            priority = priority or record.settings.priority
        ledger = ledger_holding(self._ledgers, model_id) or ledger
        return await ledger.acquire(
            model_id,
            plans,
            self._settings.request_timeout_s,
            priority or "interactive",
            is_resumed=context.is_resumed,
        )

    @returning_errors
    async def lease_memory(self, lease: MemoryLease, timeout_s: float) -> None:
        """Hold memory for a job of another process; see `Reservations.lease`."""
        await self._reservations.lease(self._ledger, lease, timeout_s)

    async def renew_memory(self, lease_id: str, measured_bytes: int) -> bool:
        """Keep a lease, counting measured memory; False for one that is not held any more."""
        return self._reservations.renew(self._ledger, lease_id, measured_bytes)

    async def return_memory(self, lease_id: str) -> None:
        """Free the memory of a lease."""
        await self._reservations.give_back(self._ledger, lease_id)

    async def _wait_until_asked(self) -> None:
        """Wait until the formats said what they hold; raise Unavailable after a request's time."""
        try:
            async with AwakeTimeout(self._settings.request_timeout_s):
                await self._recovery.has_asked.wait()
        except TimeoutError:
            problem = self._recovery.problem(self._supervisor.parts())
            raise Unavailable(problem, retry_after_s=5) from None

    async def _check_lost(self, model_id: str, context: LoadContext) -> None:
        """Find out why a router did not find the model at its residency."""
        known = self._residency(model_id)
        if context.has_died:
            await self.process_died(model_id, context.lost_replica)
        elif known is not None and known.replica_id == context.lost_replica:
            await self._release_lost(known)
        # Its file may be deleted or replaced; a model that was unloaded here needs no scan.
        if known is not None and self._residency(model_id) is None:
            await self._scanner.scan()

    async def _ledger_for(self, record: ModelRecord) -> Ledger:
        """Ask the replicas for their usage and return the ledger for a load.

        This is the only question of a load; none is asked if the model is already being loaded.
        """
        ledger = ledger_holding(self._ledgers, record.id)
        if ledger is not None and ledger.state.is_loading(record.id):
            return ledger
        usage = await self._format_clients.report(self._residencies(), record.info.format)
        ledger = ledger_holding(self._ledgers, record.id)
        ledger = ledger or self._ledger_of(usage.node_of(record.info.format))
        ledger.take_usage(usage)
        return ledger

    async def unload(self, model_id: str) -> bool:
        """Unload a model, even a pinned one, after its last request; False if not resident."""
        return await self._release(model_id, "an unload was requested")

    @returning_errors
    async def delete_model(self, model_id: str) -> BinEntry:
        """Unload a model and move its files into the bin; see `Deletions.delete`."""
        return await self._deletions.delete(model_id)

    @returning_errors
    async def locate_model(self, model_id: str, path: str) -> None:
        """Give a missing model its files at another place; see `Deletions.locate`."""
        await self._deletions.locate(model_id, path)

    async def binned(self) -> list[BinEntry]:
        """Return what is in the bin, oldest first."""
        return await self._deletions.entries()

    @returning_errors
    async def restore_model(self, entry_id: str) -> BinEntry:
        """Move a model back from the bin; see `Deletions.restore`."""
        return await self._deletions.restore(entry_id)

    @returning_errors
    async def purge_model(self, entry_id: str) -> BinEntry:
        """Delete a model in the bin for good; see `Deletions.purge`."""
        return await self._deletions.purge(entry_id)

    @returning_errors
    async def preview_load(self, model_id: str, changes: Mapping[str, Any]) -> MemoryPreview:
        """Return what the model would take with these changes of its settings; changes nothing."""
        record = await self._lookup.find(model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        record = replace(record, settings=replace(record.settings, **changes))
        ledger = ledger_holding(self._ledgers, model_id) or self._ledger
        await ledger.refresh()
        state, now = ledger.state, time.monotonic()
        return await asyncio.to_thread(self._planner.preview, record, state, now)

    async def settings_changed(self, model_id: str) -> None:
        """Apply a model's changed keep-alive and pin at once.

        Its context and sequences change with the next load.
        """
        record = await self._lookup.find(model_id)
        if record is not None:
            self._configure(record)
        self._catalog_changed()

    async def model_states(self, known_version: int = -1) -> ModelStates:
        """Return the model states once their version is not `known_version`, or after 10 s.

        A scheduler that has just started answers once it knows what is resident; after 10 s
        without that it returns empty states of version -1.
        """
        end = time.monotonic() + _STATES_LIMIT_S
        try:
            async with asyncio.timeout(_STATES_LIMIT_S):
                await self._recovery.is_done.wait()
                await self._forget_stopped()
        except TimeoutError:
            return self._published.current() if await self.is_ready() else ModelStates()
        except Exception:
            logger.exception("cannot ask Serve which formats run")
        return await self._published.wait(known_version, end - time.monotonic())

    def _model_states(self) -> ModelStates:
        return ModelStates(
            faults=self._faults.current(),
            keeps_cool=self._thermal.directive.keeps_cool,
            strain=self._thermal.strain,
            residencies=tuple(self._residencies()),
            loading=tuple(self._loading()),
            unloading=tuple(self._unloading()),
            catalog_version=self._catalog_version,
        )

    async def machine_state(
        self, known_version: int, known_decision: int, limit_s: float
    ) -> MachineState:
        """Return the machine's state once it is not of `known_version`, or after `limit_s`.

        It has the decisions after `known_decision`, as far as they are kept.
        """
        state = await self._machine.wait(known_version, min(limit_s, _STATES_LIMIT_S))
        return replace(state, decisions=tuple(self._log.since(known_decision)))

    def _machine_state(self) -> MachineState:
        return machine_state(self._ledger, self._thermal, self._log.last_number)

    async def decisions(self) -> list[Decision]:
        """Return the last decisions, oldest first."""
        return self._log.last()

    async def snapshot(self) -> SchedulerSnapshot:
        """Return the current ledger, queue, thermal state and counts."""
        taken = self._snapshot(tasks=len(asyncio.all_tasks()))
        return replace(taken, parts=tuple(self._supervisor.parts()))

    async def _release_lost(self, known: Residency) -> None:
        """Remove a model that a router did not find, unless its replica holds it."""
        is_held = await self._format_clients.is_resident(known)
        # Another request may have loaded it again meanwhile.
        ledger = ledger_holding(self._ledgers, known.model_id)
        if not is_held and ledger is not None:
            ledger.retire(known, "its replica no longer serves it: it is gone, or the file changed")

    async def process_died(self, model_id: str, replica_id: str) -> None:
        """Forget a process that died while it ran a request for the model; see `ProcessDeaths`."""
        await self._deaths.died(model_id, replica_id)

    async def _apply_directive(self, directive: Directive) -> None:
        """Apply the thermal directive to the ledger and tell others; engines get their limits."""
        if self._pauses_jobs != directive.pauses_jobs:
            self._pauses_jobs = directive.pauses_jobs
            action = "pause jobs" if directive.pauses_jobs else "let jobs go on"
            self._log.record("thermal", action, f"the machine is {self._thermal.state.label}")
        # Sensors exist only for the scheduler's own machine.
        await self._ledger.set_critical(is_critical=directive.unloads_idle)
        # A budget that the user set is theirs to judge.
        if self._settings.memory_budget is None:
            self._ledger.set_available(self._thermal.report.reading.available_bytes)
        self._notify()

    def __del__(self) -> None:
        """Cancel all tasks and close the catalog."""
        self._supervisor.cancel()
        self._store.close()
