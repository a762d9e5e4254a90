"""Opens and closes one process's models, and counts the requests that run on each."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from backends.base import Backend, ChildOptions, Engine
from backends.engine.activity import REQUEST_ID, RecordsActivity
from backends.limits import UNLIMITED, EngineLimits, Limitable, Watched
from backends.prefixes.store import BlockStore
from backends.trials import TrialOptions, TrialStore
from core.errors import BrokenModel, EngineFailed, ModelNotResident, Unavailable
from core.files import passing_cause, why
from core.supervision import log_failure
from deployments.activity import ActivityFile, ModelActivity
from deployments.messages import (
    Attempt,
    FileMark,
    LoadRequest,
    ModelUsage,
    Residency,
    UnloadResult,
)
from deployments.replica.accelerator import SharedAccelerator
from deployments.replica.file_marks import changed_error, check_unchanged, has_changed, mark
from deployments.replica.memory import ModelMemory
from deployments.replica.prefixes import prefix_store_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where this process is: its format, replica and node."""

    format: str
    replica_id: str
    node_id: str


@dataclass(slots=True, eq=False)
class OpenModel:
    """One load of a model; `key` differs from those of its other loads in this process."""

    key: str
    engine: Engine
    activity: ModelActivity
    load_request: LoadRequest
    marks: tuple[FileMark, ...]
    residency: Residency
    in_flight: int = 0
    used_at: float = field(default_factory=time.monotonic)
    was_active: bool = False
    is_draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Task[UnloadResult] | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it takes requests."""
        is_sound = not self.is_draining and not self.engine.is_failed
        return is_sound and not has_changed(self.marks)


@dataclass(frozen=True, slots=True)
class _Work:
    """The load or unload that holds the lock now, with the limit of its duration in seconds."""

    what: str
    limit_s: float
    began_at: float = field(default_factory=time.monotonic)


class ModelLoads:
    """The open models of one process.  Belongs to one event loop; weights are read on a thread.

    One load or unload runs at a time, so that the memory of each can be measured.  None waits for
    another model's requests.
    """

    def __init__(
        self,
        backend: Backend,
        block_store: BlockStore | None,
        accelerator: SharedAccelerator,
        activity: ActivityFile,
        address: Address,
        trials: TrialStore,
        compiled_folder: Path,
    ) -> None:
        self._backend = backend
        self._block_store = block_store
        self._accelerator = accelerator
        self._activity = activity
        self._address = address
        self._trials = trials
        self._compiled_folder = compiled_folder
        self.memory = ModelMemory(backend)
        # The loads that take requests, by model id; and all, with those that only finish theirs.
        self._models: dict[str, OpenModel] = {}
        self._loads: dict[str, OpenModel] = {}
        self._lock = asyncio.Lock()
        self._work: _Work | None = None
        self._numbers = count(1)
        self._closing: set[asyncio.Task[UnloadResult]] = set()
        self._limits = UNLIMITED

    async def load(self, request: LoadRequest) -> Residency:
        """Load the model unless it is loaded.

        A load whose file was replaced goes on with its requests and is closed after them; nobody
        waits for that here.  A load whose caller leaves is completed: its thread cannot be stopped.
        Raises ModelFileMissing, ModelFileChanged, and what the backend raises.
        """
        return await asyncio.shield(asyncio.ensure_future(self._load(request)))

    async def _load(self, request: LoadRequest) -> Residency:
        async with self._lock:
            known = self._models.get(request.model_id)
            if known is not None:
                if known.is_usable:
                    return known.residency
                self._close_when_idle(known)
            with self._timed(f"The load of {request.model_id}", request.load_limit_s):
                model = await self._open(request)
            self._models[request.model_id] = self._loads[model.key] = model
            _limit(model.engine, self._limits)
            logger.info("loaded %s in %.2f s", request.model_id, model.residency.load_s)
            return model.residency

    async def _open(self, request: LoadRequest) -> OpenModel:
        started = time.monotonic()
        marks = tuple(mark(path) for path in request.info.files)
        check_unchanged(request)
        key = f"{request.model_id}#{next(self._numbers)}"
        activity = self._activity.open_model(request.model_id)
        try:
            with activity.loading():
                engine = await self._open_engine(request, marks, key)
        except BaseException as problem:
            activity.close()
            if isinstance(problem, Exception) and has_changed(marks):
                raise changed_error(request) from problem
            if isinstance(problem, BrokenModel) and (cause := passing_cause(problem)):
                raise Unavailable(
                    f"{request.model_id} could not be loaded: {why(cause)}. The file itself may be "
                    "intact; the load is tried again.",
                    param="model",
                ) from problem
            raise
        if isinstance(engine, RecordsActivity):
            engine.record_activity(activity)
        choice = engine.info.choice
        residency = Residency(
            request.model_id,
            self._address.format,
            self._address.replica_id,
            self._address.node_id,
            engine.context_tokens,
            time.monotonic() - started,
            runtime="" if choice is None else choice.resolve(request.options.runtime),
            limitations=engine.limitations,
        )
        return OpenModel(key, engine, activity, request, marks, residency)

    async def _open_engine(
        self, request: LoadRequest, marks: tuple[FileMark, ...], key: str
    ) -> Engine:
        store = prefix_store_of(self._block_store, request, marks)
        trial = TrialOptions(self._trials, self._accelerator.holder())
        child = ChildOptions(request.load_limit_s, request.step_limit_s, self._compiled_folder)
        options = replace(request.options, prefix_store=store, trial=trial, child=child)
        engine = await self.memory.measure_open(
            request, lambda: self._backend.open(request.info, options), key
        )
        try:
            await self._accelerator.share(engine)
        except BaseException:
            await self.memory.measure_close(key, engine.close)
            raise
        return engine

    @contextmanager
    def _timed(self, what: str, limit_s: float) -> Iterator[None]:
        self._work = _Work(what, limit_s)
        try:
            yield
        finally:
            self._work = None

    async def unload(
        self, model_id: str, residency: Residency | None = None
    ) -> UnloadResult | None:
        """Unload the model after its last request; None if it is not loaded here.

        `residency` names one of its loads; without it, it is the one that takes requests.
        """
        model = self._models.get(model_id)
        if residency is not None:
            loads = self._loads.values()
            model = next((one for one in loads if one.residency.is_same_load(residency)), None)
        if model is None:
            return None
        return await asyncio.shield(self._close_when_idle(model))

    def _close_when_idle(self, model: OpenModel) -> "asyncio.Task[UnloadResult]":
        """Reject new requests, and close the model after its last one, on a task of its own."""
        model.is_draining = True
        if model.closing is None:
            model.closing = asyncio.ensure_future(self._drain_and_close(model))
            self._closing.add(model.closing)
            model.closing.add_done_callback(self._closing.discard)
            model.closing.add_done_callback(log_failure)
        return model.closing

    async def _drain_and_close(self, model: OpenModel) -> UnloadResult:
        while model.in_flight and not model.engine.is_failed:
            model.idle.clear()
            await model.idle.wait()
        async with self._lock:
            request = model.load_request
            if self._models.get(request.model_id) is model:
                del self._models[request.model_id]
            try:
                with self._timed(f"The unload of {request.model_id}", request.load_limit_s):
                    freed = await self.memory.measure_close(model.key, model.engine.close)
            finally:
                del self._loads[model.key]
                model.activity.close()
        logger.info("unloaded %s", request.model_id)
        return freed

    @contextmanager
    def lease(self, model_id: str, attempt: Attempt) -> Iterator[Engine]:
        """Count and record one request on the model; yields its engine.  Raises ModelNotResident.

        Also raised when the request is meant for another process, whose address was wrong then, and
        when the model's file was deleted or replaced: the scheduler then scans the folders; running
        requests finish on the old file.
        """
        model = self._models.get(model_id)
        is_meant = attempt.replica_id == self._address.replica_id
        if model is None or not is_meant or not model.is_usable:
            raise ModelNotResident(f"{model_id} is not resident here.")
        model.in_flight += 1
        model.was_active = True
        # Each call runs in a context of its own.
        REQUEST_ID.set(attempt.request_id)
        try:
            with model.activity.serving(attempt.request_id, is_suspect=attempt.is_suspect):
                yield model.engine
        finally:
            model.in_flight -= 1
            model.used_at = time.monotonic()
            if not model.in_flight:
                model.idle.set()

    def set_limits(self, limits: EngineLimits) -> None:
        """Apply `limits` to every loaded model, and to models that are loaded later."""
        self._limits = limits
        for model in self._loads.values():
            _limit(model.engine, limits)

    def usages(self) -> tuple[ModelUsage, ...]:
        """Return the usage and memory of the models; takes a reading of the memory."""
        self.memory.sample({one.key for one in self._loads.values() if one.was_active})
        for model in self._loads.values():
            model.was_active = bool(model.in_flight)
        now = time.monotonic()
        return tuple(
            ModelUsage(
                model_id,
                0.0 if model.in_flight else now - model.used_at,
                model.in_flight,
                model.engine.load(),
                self.memory.measured_bytes(model.key),
            )
            for model_id, model in self._models.items()
        )

    def check_health(self) -> None:
        """Raise EngineFailed if a load, an unload or an engine's work hangs."""
        work = self._work
        if work is not None and (lasted_s := time.monotonic() - work.began_at) > work.limit_s:
            raise EngineFailed(
                f"{work.what} has not returned for {lasted_s:.0f} s; its limit is "
                f"{work.limit_s:.0f} s."
            )
        for model in self._loads.values():
            engine, request = model.engine, model.load_request
            stalled_s = engine.stalled_s if isinstance(engine, Watched) else 0.0
            if stalled_s > request.step_limit_s:
                raise EngineFailed(
                    f"A step or preparation of {request.model_id} has not returned for "
                    f"{stalled_s:.0f} s; its limit is {request.step_limit_s:.0f} s."
                )

    def residencies(self) -> list[Residency]:
        """Return the models that take requests."""
        return [model.residency for model in self._models.values() if model.is_usable]

    async def close(self) -> None:
        """Close every model at once; their requests fail."""
        for task in self._closing:
            task.cancel()
        for model in list(self._loads.values()):
            await model.engine.close()


def _limit(engine: Engine, limits: EngineLimits) -> None:
    if isinstance(engine, Limitable):
        engine.set_limits(limits)
