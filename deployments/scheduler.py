"""The scheduler: the one owner of the memory ledger, loads and unloads."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from backends.registry import backends_for
from catalog.inspect import Inspector
from catalog.models import Converted, ModelRecord, ModelSettings, ScanReport
from catalog.scan import scan
from catalog.store import CatalogStore
from core.errors import (
    BackendUnavailable,
    ImpetusError,
    InsufficientMemory,
    ModelFileMissing,
    ModelNotFound,
    Unavailable,
)
from core.settings import Settings
from deployments.calls import Handle, call
from deployments.conversions import Conversions
from deployments.decisions import DecisionLog
from deployments.errors import returning_errors
from deployments.ledger import Ledger, Reported
from deployments.liveness import running_deployments
from deployments.logs import attach_logs
from deployments.offers import Offers
from deployments.options import budget_bytes, engine_options
from deployments.orders import Decision, ReplicaReport, Residency
from deployments.publish import Publisher
from deployments.replicas import reaching_all
from deployments.snapshot import SchedulerSnapshot, take_snapshot
from deployments.thermal import ThermalWatch
from scheduler.state import HostState, KeepRules, Limits, Offer, Priority

logger = logging.getLogger(__name__)

_REPORT_LIMIT_S = 2.0


class SchedulerReplica:
    """Decides with `scheduler.policy`, performs through the format deployments' handles.

    All state changes happen on one event loop.  Its knowledge of what is resident is asked of
    the replicas when it starts, so that its own death loses nothing.
    """

    def __init__(
        self,
        settings: Settings,
        formats: Mapping[str, Handle],
        running: Callable[[], Awaitable[frozenset[str]]] = running_deployments,
    ) -> None:
        attach_logs()
        self._settings = settings
        self._formats = formats = reaching_all(formats, settings)
        self._running = running
        self._backends = backends_for(list(formats))
        self._log = DecisionLog()
        self._budget_bytes = budget_bytes(settings)
        self._options = engine_options(settings, self._budget_bytes)
        self._offers = Offers(settings, self._backends, self._options)
        self._store = CatalogStore(settings.catalog_file)
        defaults = KeepRules(keep_alive_s=settings.keep_alive_s)
        limits = Limits(waiting_per_model=settings.max_waiting)
        state = HostState(self._budget_bytes, defaults=defaults, limits=limits)
        self._ledger = Ledger(state, self._open, self._close, self._report, self._log)
        self._scanning = asyncio.Lock()
        self._scan_began_at = 0.0
        self._conversions = Conversions(settings, self._backends, self._options, self._scan)
        self._is_ready = asyncio.Event()
        self._thermal = ThermalWatch(settings, formats, running=running, log=self._log)
        self._snapshot = partial(take_snapshot, self._ledger, self._thermal)
        idle_s = settings.format_idle_s
        publisher = Publisher(self._backends, self._snapshot, self._ledger.refresh, idle_s)
        self._background = asyncio.gather(self._run(), self._thermal.run(), publisher.run())

    async def _run(self) -> None:
        """Scan now and at intervals; remember what the replicas already hold."""
        await asyncio.to_thread(self._conversions.sweep)
        await self._scan()
        await self._recover()
        self._is_ready.set()
        while True:
            await asyncio.sleep(self._settings.scan_interval_s)
            await self._scan()

    async def _scan(self) -> None:
        """Look at the model folders; a scan that began after this call serves it as well."""
        asked_at = time.monotonic()
        async with self._scanning:
            if self._scan_began_at > asked_at:
                return
            self._scan_began_at = time.monotonic()
            try:
                report = await asyncio.to_thread(self._scan_with_inspector)
            except Exception:
                logger.exception("the scan of the model folders failed")
                return
            if report.has_news:
                logger.info("scan: %s", report)

    def _scan_with_inspector(self) -> ScanReport:
        backends = list(self._backends.values())
        inspector = Inspector(list(self._backends))
        try:
            return scan(self._settings, self._store, backends, look_into=inspector.examine)
        finally:
            inspector.close()

    async def _recover(self) -> None:
        """Take over the models' settings, and what the replicas hold."""
        for record in await asyncio.to_thread(self._store.models):
            if record.settings != ModelSettings():
                self._ledger.configure(record.id, self._offers.rules(record))
        for name, handle in self._formats.items():
            # Asking a format scaled to zero would start it, and it holds nothing.
            if self._backends[name].starts_on_demand and name not in await self._running():
                continue
            for residency in await call(handle.residencies.remote()):
                found = await asyncio.to_thread(self._store.get, residency.model_id)
                if found is not None:
                    self._ledger.restore(residency, self._offers.size_bytes(found, residency))

    async def is_ready(self) -> bool:
        """Whether the first scan is done."""
        return self._is_ready.is_set()

    async def rescan(self) -> None:
        """Scan the model folders now; calls that come together share one scan."""
        await self._scan()

    async def residencies(self) -> tuple[list[Residency], list[str]]:
        """Return the resident models and the ids of those being loaded."""
        for residency in await self._stopped(self._ledger.residencies):
            logger.info("%s ended with its idle process", residency.model_id)
            self._ledger.forget(residency)
        return self._ledger.residencies, self._ledger.loading

    @returning_errors
    async def explain(self, model_id: str) -> None:
        """Raise why a model cannot run here, starting the conversion that helps, if there is one.

        Returns where nothing is wrong with it.
        """
        record = await asyncio.to_thread(self._store.get, model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        try:
            self._offers.check(record)
            self._offers.estimate(record)
        except (BackendUnavailable, InsufficientMemory) as problem:
            if record.info.format not in self._backends:
                raise
            results = [
                other.id
                for other in await asyncio.to_thread(self._store.models)
                if isinstance(other.source, Converted) and other.source.model_id == model_id
            ]
            raise self._conversions.answer(record, problem, results) from problem

    @returning_errors
    async def ensure_loaded(
        self, model_id: str, lost_replica: str = "", priority: Priority | None = None
    ) -> Residency:
        """Return where the model is resident, waiting for memory and loading it where needed.

        `lost_replica` is where the caller believed it to be and did not find it.  `priority` None
        means the model's own.  Raises ModelNotFound, ModelFileMissing, BrokenModel,
        BackendUnavailable, InsufficientMemory, QueueFull, and Unavailable when the memory did not
        become free within the request's time.
        """
        known = self._ledger.residency(model_id)
        if lost_replica:
            if known is not None and known.replica_id == lost_replica:
                await self._release_lost(known)
            # Perhaps its file is gone or another one now.
            if self._ledger.residency(model_id) is None:
                await self._scan()
        offers: tuple[Offer, ...] = ()
        self._check_admits(model_id)
        if self._ledger.residency(model_id) is None:
            record = await self._record(model_id)
            offers = self._offers.of(record)
            priority = priority or record.settings.priority
        timeout_s = self._settings.request_timeout_s
        return await self._ledger.acquire(model_id, offers, timeout_s, priority or "interactive")

    def _check_admits(self, model_id: str) -> None:
        """Raise Unavailable where the machine is under too much strain for another load."""
        if self._ledger.residency(model_id) is None and not self._thermal.admits:
            raise Unavailable(
                f"{model_id} is not loaded: the machine is under too much strain "
                f"({self._thermal.state.label}).",
                retry_after_s=self._thermal.retry_after_s,
            )

    async def unload(self, model_id: str) -> bool:
        """Unload a model after its last request, a pinned one too; False: it is not resident."""
        return await self._ledger.release(model_id, "its unloading was asked for")

    async def settings_changed(self, model_id: str) -> None:
        """Apply what the catalog says of the model to the resident one, as far as it concerns us.

        Its context and sequences change with the next load.
        """
        record = await asyncio.to_thread(self._store.get, model_id)
        if record is not None:
            self._ledger.configure(model_id, self._offers.rules(record))

    async def decisions(self) -> list[Decision]:
        """Return the last decisions, the oldest first."""
        return self._log.last()

    async def snapshot(self) -> SchedulerSnapshot:
        """Return the ledger, the queue, the thermal state and the counts of this moment."""
        return self._snapshot()

    async def _release_lost(self, known: Residency) -> None:
        """Take out a model that a caller did not find, unless it is there again."""
        handle = self._formats[known.format]
        try:
            held: list[Residency] = await call(handle.residencies.remote())
        except ImpetusError as problem:
            logger.warning("%s does not say what it holds: %s", known.format, problem)
            held = []
        names = {(one.model_id, one.replica_id) for one in held}
        # Another caller may have had it loaded again meanwhile.
        is_same = self._ledger.residency(known.model_id) is known
        if is_same and (known.model_id, known.replica_id) not in names:
            await self._ledger.release(known.model_id, "its replica does not serve it any more")

    async def _record(self, model_id: str) -> ModelRecord:
        record = await asyncio.to_thread(self._store.get, model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        self._offers.check(record)
        return record

    async def _open(self, model_id: str, offer: Offer) -> Residency:
        record = await self._record(model_id)
        order = self._offers.order(record, offer)
        try:
            residency: Residency = await call(
                self._formats[record.info.format].load_model.remote(order)
            )
        except ModelFileMissing:
            await self._scan()
            raise
        return residency

    async def _close(self, residency: Residency) -> None:
        await call(self._formats[residency.format].unload_model.remote(residency.model_id))

    async def _report(self, known: Sequence[Residency]) -> Reported:
        """Ask the replicas of these models; those that do not answer in time are left out."""
        stopped = await self._stopped(known)
        asked = [residency for residency in known if residency not in stopped]
        names = sorted({residency.format for residency in asked})
        answers = await asyncio.gather(*(self._ask(name) for name in names))
        reports = {
            name: {report.model_id: report for report in answer.residents}
            for name, answer in zip(names, answers, strict=True)
            if answer is not None
        }
        return [
            *((residency, None) for residency in stopped),
            *(
                (residency, reports[residency.format].get(residency.model_id))
                for residency in asked
                if residency.format in reports
            ),
        ]

    async def _ask(self, name: str) -> ReplicaReport | None:
        try:
            async with asyncio.timeout(_REPORT_LIMIT_S):
                report: ReplicaReport = await call(self._formats[name].report.remote())
        except (TimeoutError, ImpetusError) as problem:
            logger.warning("%s does not say what it does: %r", name, problem)
            return None
        return report

    async def _stopped(self, known: Sequence[Residency]) -> list[Residency]:
        """Return what formats held that were scaled to zero meanwhile."""
        on_demand = [one for one in known if self._backends[one.format].starts_on_demand]
        if not on_demand:
            return []
        running = await self._running()
        return [residency for residency in on_demand if residency.format not in running]

    def __del__(self) -> None:
        """Stop scan and conversions and close the catalog."""
        self._background.cancel()
        self._conversions.cancel()
        self._ledger.cancel()
        self._store.close()
