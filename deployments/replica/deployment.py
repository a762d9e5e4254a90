"""Deployment of one model format: its replicas load models and run requests on them."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence

import ray
from ray import serve

from backends.abilities import count_tokens, tokenize
from backends.base import Engine
from backends.limits import EngineLimits
from backends.registry import backends_for
from backends.trials import TrialFolder
from core.errors import EngineFailed
from core.settings import Settings
from core.types import (
    EmbeddingParams,
    Embeddings,
    GenerationRequest,
    Priority,
    Prompt,
    Relevance,
    RerankInputs,
    TokenizedPrompt,
    TokenizeOptions,
)
from deployments.activity import ActivityFile, activity_path
from deployments.messages import (
    Attempt,
    LoadRequest,
    NodeMemory,
    ProcessReport,
    ReplicaReport,
    Residency,
    UnloadResult,
)
from deployments.options import machine_budget_bytes
from deployments.replica.accelerator import SharedAccelerator
from deployments.replica.loads import Address, ModelLoads
from deployments.replica.prefixes import open_block_store
from deployments.serve.handles import returning_errors
from deployments.serve.worker import prepare_worker
from deployments.stderr_tail import stderr_path
from deployments.transport.handle_stream import CoalescingReceiver
from deployments.transport.socket import FrameSender

logger = logging.getLogger(__name__)

_FLUSH_POLL_S = 0.01


class FormatReplica:
    """Loads models of one format and runs requests on them.

    Running requests are counted here; the scheduler only requests loads and unloads.
    """

    def __init__(self, format_name: str, settings: Settings) -> None:
        prepare_worker()
        self._format = format_name
        self._block_store = open_block_store(settings)
        backend = backends_for([format_name])[format_name]
        self._senders: dict[str, FrameSender] = {}
        self._stderr_path = stderr_path()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        node_id = ray.get_runtime_context().get_node_id()
        self._node = NodeMemory(node_id, machine_budget_bytes())
        self._accelerator = SharedAccelerator(settings.home)
        self._activity = ActivityFile(activity_path(settings.home, self._replica_id))
        self._loads = ModelLoads(
            backend,
            self._block_store,
            self._accelerator,
            self._activity,
            Address(format_name, self._replica_id, node_id),
            TrialFolder(settings.trial_folder),
            settings.compiled_folder,
        )

    @returning_errors
    async def load_model(self, request: LoadRequest) -> Residency:
        """Load the model unless it is loaded; see `ModelLoads.load`."""
        return await self._loads.load(request)

    async def unload_model(
        self, model_id: str, residency: Residency | None = None
    ) -> UnloadResult | None:
        """Unload the model after its last request; None if it is not loaded here.

        New requests get ModelNotResident, so they wait for another load.  `residency` is the load
        that is meant: after the death of its process, or a change of its file, there is another.
        """
        return await self._loads.unload(model_id, residency)

    async def set_limits(self, limits: EngineLimits) -> None:
        """Apply `limits` to every loaded model, and to models that are loaded later."""
        self._loads.set_limits(limits)

    @returning_errors
    async def generate(
        self, request: GenerationRequest, socket_path: str, attempt: Attempt
    ) -> None:
        """Run a request; its events go to the router's socket, one frame per step."""
        with self._loads.lease(request.model_id, attempt) as engine:
            sender = self._sender(socket_path)
            await self._run(engine, request, sender)
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

    async def stream(
        self, request: GenerationRequest, attempt: Attempt
    ) -> AsyncGenerator[bytes, None]:
        """Run a request for a router on another node; yields frames."""
        with self._loads.lease(request.model_id, attempt) as engine:
            receiver = CoalescingReceiver(asyncio.get_running_loop())
            work = asyncio.ensure_future(engine.stream_to(request, receiver))
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
        self,
        model_id: str,
        inputs: Sequence[str | Sequence[int]],
        priority: Priority,
        deadline_s: float | None,
        params: EmbeddingParams,
        attempt: Attempt,
    ) -> Embeddings:
        """Return one vector per input."""
        with self._loads.lease(model_id, attempt) as engine:
            return await engine.embed(inputs, priority, deadline_s, params)

    @returning_errors
    async def rerank(
        self,
        model_id: str,
        inputs: RerankInputs,
        priority: Priority,
        deadline_s: float | None,
        attempt: Attempt,
    ) -> Relevance:
        """Return one score per document."""
        with self._loads.lease(model_id, attempt) as engine:
            return await engine.rerank(inputs, priority, deadline_s)

    @returning_errors
    async def count_tokens(
        self,
        model_id: str,
        prompt: Prompt,
        deadline_s: float | None,
        attempt: Attempt,
    ) -> int:
        """Return the number of tokens of a prompt for this model."""
        with self._loads.lease(model_id, attempt) as engine:
            return await count_tokens(engine, prompt, deadline_s)

    @returning_errors
    async def tokenize(
        self,
        model_id: str,
        prompt: Prompt,
        options: TokenizeOptions,
        deadline_s: float | None,
        attempt: Attempt,
    ) -> TokenizedPrompt:
        """Return a prompt's text and tokens for this model."""
        with self._loads.lease(model_id, attempt) as engine:
            return await tokenize(engine, prompt, options, deadline_s)

    def _sender(self, socket_path: str) -> FrameSender:
        sender = self._senders.get(socket_path)
        if sender is None or sender.is_broken:
            try:
                sender = FrameSender(socket_path)
            except OSError as problem:
                raise EngineFailed(f"Cannot connect to the router's socket: {problem}") from problem
            # Routers that are gone leave broken ones.
            kept = {path: one for path, one in self._senders.items() if not one.is_broken}
            self._senders = {**kept, socket_path: sender}
        return sender

    async def report(self) -> ReplicaReport:
        """Return the usage and memory of this process's models."""
        residents = self._loads.usages()
        process = ProcessReport(
            self._replica_id, self._loads.memory.kept_bytes, self._stderr_path, self._node
        )
        return ReplicaReport(
            self._format, os.getpid(), residents, (process,), tasks=len(asyncio.all_tasks())
        )

    async def check_health(self) -> None:
        """Raise EngineFailed if a load, an engine or the accelerator's lock hangs.

        Serve then replaces this process.
        """
        self._loads.check_health()
        if problem := self._accelerator.problem:
            raise EngineFailed(problem)

    async def residencies(self) -> list[Residency]:
        """Return the loaded models, for a scheduler that restarts."""
        return self._loads.residencies()

    async def __del__(self) -> None:
        """Close every model; Serve awaits this at shutdown."""
        await self._loads.close()
        await self._accelerator.close()
        if self._block_store is not None:
            await asyncio.to_thread(self._block_store.close)
        for sender in self._senders.values():
            sender.close()
        self._activity.close()
