"""Deployment of one model format: its replicas load models and run requests on them."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

import ray
from ray import serve

from backends.abilities import count_tokens
from backends.base import Engine
from backends.limits import UNLIMITED, EngineLimits, Limitable, Watched
from backends.registry import backends_for
from core.errors import EngineFailed, ImpetusError, ModelNotResident
from core.settings import Settings
from core.types import Embeddings, GenerationRequest, Priority, Prompt
from deployments.messages import (
    FileMark,
    LoadRequest,
    ModelUsage,
    NodeMemory,
    ProcessReport,
    ReplicaReport,
    Residency,
    UnloadResult,
)
from deployments.options import machine_budget_bytes
from deployments.replica.accelerator import SharedAccelerator
from deployments.replica.file_marks import has_changed, mark
from deployments.replica.memory import ModelMemory
from deployments.replica.prefixes import open_block_store, prefix_store_of
from deployments.serve.handles import returning_errors
from deployments.serve.logs import attach_logs
from deployments.stderr_tail import stderr_path
from deployments.transport.handle_stream import CoalescingReceiver
from deployments.transport.socket import FrameSender

logger = logging.getLogger(__name__)

_FLUSH_POLL_S = 0.01


@dataclass(slots=True, eq=False)
class _OpenModel:
    """One load of a model; `key` differs from those of its other loads in this process."""

    key: str
    engine: Engine
    load_request: LoadRequest
    marks: tuple[FileMark, ...]
    residency: Residency
    in_flight: int = 0
    used_at: float = field(default_factory=time.monotonic)
    was_active: bool = False
    is_draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Task[UnloadResult] | None = None


class FormatReplica:
    """Loads models of one format and runs requests on them.

    Running requests are counted here; the scheduler only requests loads and unloads.
    """

    def __init__(self, format_name: str, settings: Settings) -> None:
        attach_logs()
        self._format = format_name
        self._block_store = open_block_store(settings)
        self._backend = backends_for([format_name])[format_name]
        # The loads that take requests, by model id; and all, with those that only finish theirs.
        self._models: dict[str, _OpenModel] = {}
        self._loads: dict[str, _OpenModel] = {}
        self._senders: dict[str, FrameSender] = {}
        self._load_lock = asyncio.Lock()
        self._load_numbers = count(1)
        self._closing: set[asyncio.Task[UnloadResult]] = set()
        self._limits = UNLIMITED
        self._accelerator = SharedAccelerator(settings.home)
        self._memory = ModelMemory(self._backend)
        self._stderr_path = stderr_path()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._node_id = ray.get_runtime_context().get_node_id()
        self._node = NodeMemory(self._node_id, machine_budget_bytes())

    @returning_errors
    async def load_model(self, request: LoadRequest) -> Residency:
        """Load the model unless it is loaded; the weights are read on a thread.

        A load whose file was replaced goes on with its requests and is closed after them; nobody
        waits for that here.  A load whose caller leaves is completed: its thread cannot be stopped.
        """
        return await asyncio.shield(asyncio.ensure_future(self._load(request)))

    async def _load(self, request: LoadRequest) -> Residency:
        async with self._load_lock:
            model = self._models.get(request.model_id)
            if model is not None:
                if _is_usable(model):
                    return model.residency
                self._close_when_idle(model)
            started = time.monotonic()
            marks = tuple(mark(path) for path in request.info.files)
            options = replace(
                request.options, prefix_store=prefix_store_of(self._block_store, request, marks)
            )
            key = f"{request.model_id}#{next(self._load_numbers)}"
            engine = await self._memory.measure_open(
                request, lambda: self._backend.open(request.info, options), key
            )
            try:
                await self._accelerator.share(engine)
            except ImpetusError:
                await self._memory.measure_close(key, engine.close)
                raise
            residency = Residency(
                request.model_id,
                self._format,
                self._replica_id,
                self._node_id,
                engine.context_tokens,
                time.monotonic() - started,
            )
            model = _OpenModel(key, engine, request, marks, residency)
            self._models[request.model_id] = self._loads[key] = model
            _limit(engine, self._limits)
            logger.info("loaded %s in %.2f s", request.model_id, residency.load_s)
            return residency

    async def unload_model(self, model_id: str) -> UnloadResult | None:
        """Unload the model after its last request; None if it is not loaded here.

        New requests get ModelNotResident, so they wait for another load.
        """
        model = self._models.get(model_id)
        if model is None:
            return None
        return await asyncio.shield(self._close_when_idle(model))

    def _close_when_idle(self, model: _OpenModel) -> "asyncio.Task[UnloadResult]":
        """Reject new requests, and close the model after its last one, on a task of its own."""
        model.is_draining = True
        if model.closing is None:
            model.closing = asyncio.ensure_future(self._drain_and_close(model))
            self._closing.add(model.closing)
            model.closing.add_done_callback(self._closing.discard)
        return model.closing

    async def _drain_and_close(self, model: _OpenModel) -> UnloadResult:
        while model.in_flight and not model.engine.is_failed:
            model.idle.clear()
            await model.idle.wait()
        async with self._load_lock:
            model_id = model.load_request.model_id
            if self._models.get(model_id) is model:
                del self._models[model_id]
            del self._loads[model.key]
            freed = await self._memory.measure_close(model.key, model.engine.close)
        logger.info("unloaded %s", model_id)
        return freed

    async def set_limits(self, limits: EngineLimits) -> None:
        """Apply `limits` to every loaded model, and to models that are loaded later."""
        self._limits = limits
        for model in self._loads.values():
            _limit(model.engine, limits)

    @returning_errors
    async def generate(self, request: GenerationRequest, socket_path: str) -> None:
        """Run a request; its events go to the router's socket, one frame per step."""
        with self._lease(request.model_id) as model:
            sender = self._sender(socket_path)
            await self._run(model.engine, request, sender)
            while not sender.flush():
                await asyncio.sleep(_FLUSH_POLL_S)

    @staticmethod
    async def _run(engine: Engine, request: GenerationRequest, sender: FrameSender) -> None:
        """Run the request; cancel it if its events cannot be sent."""
        loop = asyncio.get_running_loop()
        work = asyncio.ensure_future(engine.stream_to(request, sender))
        try:
            with sender.watched(lambda: loop.call_soon_threadsafe(work.cancel)):
                await asyncio.wait({work})
            if sender.is_broken:
                raise EngineFailed("The connection to the router broke.")
            work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[bytes, None]:
        """Run a request for a router on another node; yields frames."""
        with self._lease(request.model_id) as model:
            receiver = CoalescingReceiver(asyncio.get_running_loop())
            work = asyncio.ensure_future(model.engine.stream_to(request, receiver))
            work.add_done_callback(lambda _: receiver.end())
            try:
                async for frame in receiver.frames():
                    yield frame
                work.result()
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    @returning_errors
    async def embed(
        self, model_id: str, inputs: Sequence[str | Sequence[int]], priority: Priority
    ) -> Embeddings:
        """Return one vector per input."""
        with self._lease(model_id) as model:
            return await model.engine.embed(inputs, priority)

    @returning_errors
    async def count_tokens(self, model_id: str, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt for this model."""
        with self._lease(model_id) as model:
            return await count_tokens(model.engine, prompt)

    @contextmanager
    def _lease(self, model_id: str) -> Iterator[_OpenModel]:
        """Count one request on the model.  Raises ModelNotResident.

        Also raised when the model's file was deleted or replaced: the scheduler then scans the
        folders; running requests finish on the old file.
        """
        model = self._models.get(model_id)
        if model is None or not _is_usable(model):
            raise ModelNotResident(f"{model_id} is not resident here.")
        model.in_flight += 1
        model.was_active = True
        try:
            yield model
        finally:
            model.in_flight -= 1
            model.used_at = time.monotonic()
            if not model.in_flight:
                model.idle.set()

    def _sender(self, socket_path: str) -> FrameSender:
        sender = self._senders.get(socket_path)
        if sender is None or sender.is_broken:
            try:
                sender = FrameSender(socket_path)
            except OSError as problem:
                raise EngineFailed(f"Cannot connect to the router's socket: {problem}") from problem
            self._senders[socket_path] = sender
        return sender

    async def report(self) -> ReplicaReport:
        """Return the usage and memory of this process's models."""
        self._memory.sample({one.key for one in self._models.values() if one.was_active})
        for model in self._models.values():
            model.was_active = bool(model.in_flight)
        now = time.monotonic()
        residents = tuple(
            ModelUsage(
                model_id,
                0.0 if model.in_flight else now - model.used_at,
                model.in_flight,
                model.engine.load(),
                self._memory.measured_bytes(model.key),
            )
            for model_id, model in self._models.items()
        )
        process = ProcessReport(
            self._replica_id, self._memory.kept_bytes, self._stderr_path, self._node
        )
        return ReplicaReport(
            self._format, os.getpid(), residents, (process,), tasks=len(asyncio.all_tasks())
        )

    async def check_health(self) -> None:
        """Raise EngineFailed if an engine's step hangs: Serve then replaces this process."""
        for model in self._loads.values():
            engine, model_id = model.engine, model.load_request.model_id
            stalled_s = engine.stalled_s if isinstance(engine, Watched) else 0.0
            if stalled_s > model.load_request.step_limit_s:
                raise EngineFailed(f"A step of {model_id} has not returned for {stalled_s:.0f} s.")

    async def residencies(self) -> list[Residency]:
        """Return the loaded models, for a scheduler that restarts."""
        return [model.residency for model in self._models.values() if _is_usable(model)]

    async def __del__(self) -> None:
        """Close every model; Serve awaits this at shutdown."""
        for model in list(self._loads.values()):
            await model.engine.close()
        await self._accelerator.close()
        if self._block_store is not None:
            await asyncio.to_thread(self._block_store.close)
        for sender in self._senders.values():
            sender.close()


def _limit(engine: Engine, limits: EngineLimits) -> None:
    if isinstance(engine, Limitable):
        engine.set_limits(limits)


def _is_usable(model: _OpenModel) -> bool:
    is_sound = not model.is_draining and not model.engine.is_failed
    return is_sound and not has_changed(model.marks)
