"""The scheduler: the one owner of the memory ledger, loads and unloads."""

import asyncio
import logging
import time
from collections.abc import Mapping

from backends.base import EngineOptions, MemoryEstimate
from backends.registry import backends_for
from backends.threads import performance_cores
from catalog.models import ModelRecord
from catalog.scan import scan
from catalog.store import CatalogStore
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ImpetusError,
    InsufficientMemory,
    ModelFileMissing,
    ModelNotFound,
)
from core.settings import Settings
from deployments.calls import Handle, call
from deployments.errors import returning_errors
from deployments.logs import attach_logs
from deployments.orders import LoadOrder, ReplicaReport, Residency, ResidentReport
from scheduler.policy import decide
from scheduler.sensors import machine_memory_bytes, memory_budget_bytes
from scheduler.state import HostState, Load, LoadWanted, Reject, Resident, Unload

logger = logging.getLogger(__name__)


def engine_options(settings: Settings, budget_bytes: int) -> EngineOptions:
    """Return how engines are opened under these settings."""
    return EngineOptions(
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
        threads=settings.threads or performance_cores(),
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        context_tokens=settings.context_length,
        memory_limit_bytes=budget_bytes,
    )


def budget_bytes(settings: Settings) -> int:
    """Return what all models may use together."""
    return settings.memory_budget or memory_budget_bytes(machine_memory_bytes())


class SchedulerReplica:
    """Decides with `scheduler.policy`, performs through the format deployments' handles.

    All state changes happen on one event loop.  Its knowledge of what is resident is asked of
    the replicas when it starts, so that its own death loses nothing.
    """

    def __init__(self, settings: Settings, formats: Mapping[str, Handle]) -> None:
        attach_logs()
        self._settings = settings
        self._formats = formats
        self._backends = backends_for(list(formats))
        self._budget_bytes = budget_bytes(settings)
        self._options = engine_options(settings, self._budget_bytes)
        self._store = CatalogStore(settings.catalog_file)
        self._residents: dict[str, tuple[Residency, MemoryEstimate]] = {}
        self._loads: dict[str, asyncio.Task[Residency]] = {}
        self._loading: dict[str, int] = {}
        self._ledger = asyncio.Lock()
        self._scanning = asyncio.Lock()
        self._scan_began_at = 0.0
        self._is_ready = asyncio.Event()
        self._background = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        """Scan now and at intervals; remember what the replicas already hold."""
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
                report = await asyncio.to_thread(
                    scan, self._settings, self._store, list(self._backends.values())
                )
            except Exception:
                logger.exception("the scan of the model folders failed")
                return
            if report.has_news:
                logger.info("scan: %s", report)

    async def _recover(self) -> None:
        for name, handle in self._formats.items():
            # Asking a format scaled to zero would start it, and it holds nothing.
            if self._backends[name].starts_on_demand:
                continue
            for residency in await call(handle.residencies.remote()):
                record = self._store.get(residency.model_id)
                if record is not None:
                    estimate = self._estimate(record)
                    self._residents[residency.model_id] = (residency, estimate)

    async def is_ready(self) -> bool:
        """Whether the first scan is done."""
        return self._is_ready.is_set()

    async def rescan(self) -> None:
        """Scan the model folders now; calls that come together share one scan."""
        await self._scan()

    async def residencies(self) -> tuple[list[Residency], list[str]]:
        """Return the resident models and the ids of those being loaded."""
        return [residency for residency, _ in self._residents.values()], list(self._loads)

    @returning_errors
    async def ensure_loaded(self, model_id: str, lost_replica: str = "") -> Residency:
        """Return where the model is resident, loading it first where needed; single-flight.

        `lost_replica` is where the caller believed it to be and did not find it.  Raises
        ModelNotFound, ModelFileMissing, BrokenModel, BackendUnavailable, InsufficientMemory.
        """
        known = self._residents.get(model_id)
        if known is not None:
            if known[0].replica_id != lost_replica:
                return known[0]
            del self._residents[model_id]
        task = self._loads.get(model_id)
        if task is None:
            task = asyncio.ensure_future(self._load(model_id, was_lost=bool(lost_replica)))
            self._loads[model_id] = task
            task.add_done_callback(lambda _: self._loads.pop(model_id, None))
        # One waiting client that leaves must not stop the load of the others.
        return await asyncio.shield(task)

    async def _load(self, model_id: str, *, was_lost: bool) -> Residency:
        if was_lost:
            # Perhaps because its file is gone or another one now.
            await self._scan()
        record = await asyncio.to_thread(self._store.get, model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        self._check(record)
        estimate = self._estimate(record)
        await self._promise(record, estimate)
        order = LoadOrder(model_id, record.info, self._options)
        handle = self._formats[record.info.format]
        try:
            residency: Residency = await call(handle.load_model.remote(order))
        except ModelFileMissing:
            await self._scan()
            raise
        finally:
            self._loading.pop(model_id, None)
        self._residents[model_id] = (residency, estimate)
        return residency

    def _check(self, record: ModelRecord) -> None:
        if record.state == "refused":
            raise BrokenModel(f"{record.id} was refused: {record.reason}", param="model")
        if record.state == "missing":
            raise ModelFileMissing(
                f"The file of {record.id} is gone: {record.info.files[0]}. Put it back, or choose "
                "another model.",
                param="model",
            )
        backend = self._backends.get(record.info.format)
        if backend is None:
            raise BackendUnavailable(f"The format {record.info.format} is not served here.")
        availability = backend.availability()
        if not availability.is_available:
            raise BackendUnavailable(availability.reason)

    def _estimate(self, record: ModelRecord) -> MemoryEstimate:
        return self._backends[record.info.format].estimate(record.info, self._options)

    async def _promise(self, record: ModelRecord, estimate: MemoryEstimate) -> None:
        """Make room in the ledger and promise it to the model.  Raises InsufficientMemory."""
        async with self._ledger:
            state = await self._state()
            for action in decide(state, LoadWanted(record.id, estimate.total_bytes)):
                match action:
                    case Unload(model_id, reason):
                        # A request that missed it meanwhile has taken it out already.
                        if model_id in self._residents:
                            await self._unload(model_id, reason)
                    case Load(model_id, needed):
                        self._loading[model_id] = needed
                    case Reject(_, message):
                        raise InsufficientMemory(message, param="model", retry_after_s=10)

    async def _state(self) -> HostState:
        """Return the ledger, with what the replicas say of their models' use."""
        reports = await self._reports() if self._residents else {}
        now = time.monotonic()
        residents = []
        for model_id, (_, estimate) in self._residents.items():
            report = reports.get(model_id)
            idle_s = report.idle_s if report else 0.0
            in_flight = report.in_flight if report else 0
            residents.append(Resident(model_id, estimate.total_bytes, now - idle_s, in_flight))
        return HostState(self._budget_bytes, tuple(residents), tuple(self._loading.items()))

    async def _reports(self) -> dict[str, ResidentReport]:
        reports: dict[str, ResidentReport] = {}
        for name in {residency.format for residency, _ in self._residents.values()}:
            replica: ReplicaReport = await call(self._formats[name].report.remote())
            reports.update((report.model_id, report) for report in replica.residents)
        return reports

    async def _unload(self, model_id: str, reason: str) -> None:
        logger.info("unloading %s: %s", model_id, reason)
        residency, _ = self._residents[model_id]
        # From now on a request for it asks for a load, which waits for the ledger.
        del self._residents[model_id]
        try:
            await call(self._formats[residency.format].unload_model.remote(model_id))
        except ImpetusError:
            # A replica that died holds nothing any more.
            logger.exception("unloading %s failed", model_id)

    def __del__(self) -> None:
        """Stop the background scan and close the catalog."""
        self._background.cancel()
        self._store.close()
