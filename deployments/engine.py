"""The deployment of one model format: its replicas hold the resident models."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray import serve

from backends.base import Engine
from backends.counting import TokenCounting
from backends.limits import UNLIMITED, EngineLimits, Limitable
from backends.registry import backends_for
from core.errors import (
    EngineFailed,
    ModelFileMissing,
    ModelNotResident,
    UnsupportedCapability,
)
from core.types import Embeddings, GenerationRequest, Prompt
from deployments.codec import StepEvents, encode_frame
from deployments.errors import returning_errors
from deployments.frames import FrameSender
from deployments.logs import attach_logs
from deployments.orders import FileMark, LoadOrder, ReplicaReport, Residency, ResidentReport
from deployments.turn_taking import SharedTurns

logger = logging.getLogger(__name__)

_FLUSH_POLL_S = 0.01
# Events of a request from another node are sent together for this long, the first at once.
_COALESCE_S = 0.02


@dataclass(slots=True, eq=False)
class _Resident:
    engine: Engine
    order: LoadOrder
    marks: tuple[FileMark, ...]
    residency: Residency
    in_flight: int = 0
    used_at: float = field(default_factory=time.monotonic)
    is_draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class FormatReplica:
    """Opens models of one format and runs requests on them.

    A model's requests are counted here; the scheduler asks for loads and unloads only.
    """

    def __init__(self, format_name: str, home: Path) -> None:
        attach_logs()
        self._format = format_name
        self._backend = backends_for([format_name])[format_name]
        self._residents: dict[str, _Resident] = {}
        self._senders: dict[str, FrameSender] = {}
        self._changing = asyncio.Lock()
        self._limits = UNLIMITED
        self._turns = SharedTurns(home)
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._node_id = ray.get_runtime_context().get_node_id()

    @returning_errors
    async def load_model(self, order: LoadOrder) -> Residency:
        """Open the model unless it is open; the weights are read on a thread."""
        async with self._changing:
            resident = self._residents.get(order.model_id)
            if resident is not None:
                if _is_usable(resident):
                    return resident.residency
                await self._drain(resident)
                await self._close(resident)
            started = time.monotonic()
            marks = tuple(_mark(path) for path in order.info.files)
            engine = await asyncio.to_thread(self._backend.open, order.info, order.options)
            await self._turns.share(engine)
            residency = Residency(
                order.model_id,
                self._format,
                self._replica_id,
                self._node_id,
                engine.context_tokens,
                time.monotonic() - started,
            )
            self._residents[order.model_id] = _Resident(engine, order, marks, residency)
            _limit(engine, self._limits)
            logger.info("loaded %s in %.2f s", order.model_id, residency.load_s)
            return residency

    async def unload_model(self, model_id: str) -> bool:
        """Let the model's requests end, then free it; False when it was not here.

        New requests for it are told that it is not resident, so that they wait for a load.
        """
        resident = self._residents.get(model_id)
        if resident is None:
            return False
        await self._drain(resident)
        async with self._changing:
            if self._residents.get(model_id) is resident:
                await self._close(resident)
        return True

    @staticmethod
    async def _drain(resident: _Resident) -> None:
        """Take no more requests and wait for those that run."""
        resident.is_draining = True
        while resident.in_flight and not resident.engine.is_failed:
            resident.idle.clear()
            await resident.idle.wait()

    async def _close(self, resident: _Resident) -> None:
        del self._residents[resident.order.model_id]
        await resident.engine.close()
        logger.info("unloaded %s", resident.order.model_id)

    async def set_limits(self, limits: EngineLimits) -> None:
        """Make every resident model obey `limits`, and those that are loaded later."""
        self._limits = limits
        for resident in self._residents.values():
            _limit(resident.engine, limits)

    @returning_errors
    async def generate(self, request: GenerationRequest, socket_path: str) -> None:
        """Run a request, its events going to the router's socket, one frame a step."""
        sender = await self._sender(socket_path)
        with self._lease(request.model_id) as resident:
            await self._run(resident.engine, request, sender)
            while not sender.flush():
                await asyncio.sleep(_FLUSH_POLL_S)

    @staticmethod
    async def _run(engine: Engine, request: GenerationRequest, sender: FrameSender) -> None:
        """Run the request for as long as its events can be sent."""
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
        """Run a request for a router on another node, yielding frames."""
        with self._lease(request.model_id) as resident:
            sink = _CoalescingSink(asyncio.get_running_loop())
            work = asyncio.ensure_future(resident.engine.stream_to(request, sink))
            work.add_done_callback(lambda _: sink.end())
            try:
                async for frame in sink.frames():
                    yield frame
                work.result()
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    @returning_errors
    async def embed(self, model_id: str, inputs: Sequence[str | Sequence[int]]) -> Embeddings:
        """Return one vector per input."""
        with self._lease(model_id) as resident:
            return await resident.engine.embed(inputs)

    @returning_errors
    async def count_tokens(self, model_id: str, prompt: Prompt) -> int:
        """Return how many tokens a prompt comes to for this model."""
        with self._lease(model_id) as resident:
            engine = resident.engine
            if not isinstance(engine, TokenCounting):
                raise UnsupportedCapability(
                    f"The model {model_id} cannot count tokens.", param="model"
                )
            return await engine.count_tokens(prompt)

    @contextmanager
    def _lease(self, model_id: str) -> Iterator[_Resident]:
        """Hold the model for one request.  Raises ModelNotResident.

        So it does when the model's file was deleted or replaced: the scheduler then looks at the
        disk, while requests that run on the old file end in peace.
        """
        resident = self._residents.get(model_id)
        if resident is None or not _is_usable(resident):
            raise ModelNotResident(f"{model_id} is not resident here.")
        resident.in_flight += 1
        try:
            yield resident
        finally:
            resident.in_flight -= 1
            resident.used_at = time.monotonic()
            if not resident.in_flight:
                resident.idle.set()

    async def _sender(self, socket_path: str) -> FrameSender:
        sender = self._senders.get(socket_path)
        if sender is None or sender.is_broken:
            try:
                sender = FrameSender(socket_path)
            except OSError as problem:
                raise EngineFailed(f"The router's socket cannot be reached: {problem}") from problem
            self._senders[socket_path] = sender
        return sender

    async def report(self) -> ReplicaReport:
        """Return what this process holds and does."""
        now = time.monotonic()
        residents = tuple(
            ResidentReport(
                model_id,
                0.0 if resident.in_flight else now - resident.used_at,
                resident.in_flight,
                resident.engine.load(),
            )
            for model_id, resident in self._residents.items()
        )
        return ReplicaReport(self._format, os.getpid(), residents)

    async def residencies(self) -> list[Residency]:
        """Return what is resident, for a scheduler that starts anew."""
        return [resident.residency for resident in self._residents.values() if _is_usable(resident)]

    async def __del__(self) -> None:
        """Free every model; Serve awaits this at shutdown."""
        for resident in list(self._residents.values()):
            await resident.engine.close()
        await self._turns.close()
        for sender in self._senders.values():
            sender.close()


class _CoalescingSink:
    """Collects events on an event loop and gives them out as frames."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[StepEvents | None] = asyncio.Queue()

    def deliver(self, batch: StepEvents) -> None:
        """Take a step's events, from any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, batch)

    def end(self) -> None:
        """Say that nothing more comes."""
        self._loop.call_soon(self._queue.put_nowait, None)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the first frame at once, later ones at most every 20 ms."""
        sent_at = 0.0
        while (batch := await self._queue.get()) is not None:
            wait = sent_at + _COALESCE_S - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            batches, is_last = list(batch), False
            while not self._queue.empty():
                more = self._queue.get_nowait()
                if more is None:
                    is_last = True
                    break
                batches.extend(more)
            sent_at = time.monotonic()
            yield encode_frame(batches)
            if is_last:
                return


def _limit(engine: Engine, limits: EngineLimits) -> None:
    if isinstance(engine, Limitable):
        engine.set_limits(limits)


def _is_usable(resident: _Resident) -> bool:
    is_sound = not resident.is_draining and not resident.engine.is_failed
    return is_sound and not _changed(resident.marks)


def _mark(path: Path) -> FileMark:
    try:
        status = path.stat()
    except OSError as problem:
        raise ModelFileMissing(f"{path} cannot be read: {problem}", param="model") from problem
    return FileMark(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


def _changed(marks: Sequence[FileMark]) -> bool:
    """Whether a file is gone or another than the one that was opened."""
    for mark in marks:
        try:
            status = os.stat(mark.path)
        except OSError:
            return True
        now = (status.st_size, status.st_mtime_ns, status.st_ino)
        if now != (mark.size_bytes, mark.modified_ns, mark.inode):
            return True
    return False
