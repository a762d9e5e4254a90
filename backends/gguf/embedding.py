"""Embeddings from GGUF models with a pooling layer."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineLoad, EngineOptions, ModelInfo
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.slot_gate import SlotGate
from backends.engine.threads import name_this_thread
from backends.engine.waiting import Pace
from backends.gguf.batch import Batch
from backends.gguf.model import GgufModel, library, native_log
from backends.limits import UNLIMITED, EngineLimits, StepWatch
from core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InsufficientMemory,
    RequestError,
    UnsupportedCapability,
)
from core.types import Embeddings, GenerationEvent, GenerationRequest, Priority

_MOST_SEQUENCES = 32


class GgufEmbedder(Engine):
    """One resident embedding model; all native work is on one thread of its own."""

    def __init__(self, info: ModelInfo, options: EngineOptions) -> None:
        """Load the model and open its context; blocks.  Raises BrokenModel, InsufficientMemory."""
        self.info = info
        self.max_sequences = 1
        self.context_tokens = min(
            options.context_tokens or info.context_length, info.context_length
        )
        self._running, self._max_waiting, self._pace = 0, options.max_waiting, Pace()
        self._is_closed = False
        self._watch = StepWatch()
        self._take_turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self._limits = UNLIMITED
        self._gate = SlotGate(1)
        self._pool = ThreadPoolExecutor(
            1, initializer=name_this_thread, initargs=("impetus-engine",)
        )
        try:
            self._pool.submit(self._open, options).result()
        except BaseException:
            self._pool.shutdown(wait=False)
            raise

    def _open(self, options: EngineOptions) -> None:
        self._llama = library()
        self._model = GgufModel(self.info.files[0])
        params = self._llama.llama_context_default_params()
        # A pooled sequence must be computed in one piece, so a batch holds a whole context.
        params.n_ctx = params.n_batch = params.n_ubatch = self.context_tokens
        params.n_seq_max = _MOST_SEQUENCES
        params.n_threads = params.n_threads_batch = options.threads
        params.embeddings = True
        params.kv_unified = True
        params.no_perf = True
        self._context = self._llama.llama_init_from_model(self._model.handle, params)
        if not self._context:
            self._model.close()
            raise InsufficientMemory(
                f"No context could be opened: {native_log.take_errors()}", param="model"
            )
        self._batch = Batch(self.context_tokens)
        self._dimension = int(self._llama.llama_model_n_embd_out(self._model.handle))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Refuse: an embedding model generates no text."""
        raise UnsupportedCapability(
            f"The model {request.model_id} makes embeddings, not text.", param="model"
        )
        yield  # pragma: no cover - makes this an async generator

    async def embed(
        self, inputs: Sequence[str | Sequence[int]], priority: Priority = "interactive"
    ) -> Embeddings:
        """Return unit-length vectors in order; see `Engine.embed`.  Raises QueueFull too."""
        if self._is_closed:
            raise EngineFailed(f"The model {self.info.name} was unloaded.")
        self._limits.check_admits(is_resumed=False)
        if self._running > self._max_waiting:
            raise self._pace.refusal(self._max_waiting, 1, self.info.name)
        loop = asyncio.get_running_loop()
        self._running += 1
        try:
            await self._gate.acquire(priority)
            started_at = time.monotonic()
            try:
                embeddings = await loop.run_in_executor(self._pool, self._embed, list(inputs))
            finally:
                self._gate.release()
            self._pace.note(time.monotonic() - started_at)
            return embeddings
        finally:
            self._running -= 1

    def set_limits(self, limits: EngineLimits) -> None:
        """Obey `limits`: pause between batches, and take nothing new where they say so."""
        self._limits = limits

    def _embed(self, inputs: list[str | Sequence[int]]) -> Embeddings:
        token_lists = [self._tokens(text) for text in inputs]
        vectors = np.empty((len(inputs), self._dimension), np.float32)
        for group in self._groups(token_lists):
            with self._take_turn(), self._watch:
                self._compute(group, token_lists, vectors)
            self._limits.rest()
        return Embeddings(vectors, sum(map(len, token_lists)))

    def _tokens(self, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            ids = self._model.encode(text, add_bos=True, parse_special=False)
        else:
            ids = list(text)
            if any(not 0 <= token_id < self._model.vocabulary_size for token_id in ids):
                raise RequestError(
                    f"A token id is outside the {self._model.vocabulary_size} of the vocabulary.",
                    param="input",
                )
        if not ids:
            raise RequestError("An input is empty.", param="input")
        if len(ids) > self.context_tokens:
            raise ContextLengthExceeded.of(len(ids), self.context_tokens)
        return ids

    def _groups(self, token_lists: list[list[int]]) -> list[list[int]]:
        """Return indices grouped so that each group fits one batch."""
        groups: list[list[int]] = []
        used = 0
        for index, ids in enumerate(token_lists):
            is_full = not groups or len(groups[-1]) == _MOST_SEQUENCES
            if is_full or used + len(ids) > self._batch.capacity:
                groups.append([])
                used = 0
            groups[-1].append(index)
            used += len(ids)
        return groups

    def _compute(
        self, group: list[int], token_lists: list[list[int]], vectors: NDArray[np.float32]
    ) -> None:
        self._batch.clear()
        for sequence, index in enumerate(group):
            self._batch.add(sequence, 0, token_lists[index], logits=True)
        self._batch.want_all()
        memory: Any = self._llama.llama_get_memory(self._context)
        if memory:
            self._llama.llama_memory_clear(memory, True)
        code = self._llama.llama_decode(self._context, self._batch.native)
        if code != 0:
            raise EngineFailed(f"llama_decode failed with {code}: {native_log.take_errors()}")
        for sequence, index in enumerate(group):
            pointer = self._llama.llama_get_embeddings_seq(self._context, sequence)
            vector = np.ctypeslib.as_array(pointer, (self._dimension,))
            length = float(np.linalg.norm(vector))
            if not np.isfinite(length):
                raise EngineFailed(f"The model {self.info.name} computed a non-finite vector.")
            vectors[index] = vector / length if length else vector

    def load(self) -> EngineLoad:
        """Return the counts of this moment."""
        return EngineLoad(running=min(self._running, 1), waiting=max(self._running - 1, 0))

    @property
    def stalled_s(self) -> float:
        """How long the running batch has lasted; see `backends.limits.Watched`."""
        return self._watch.lasted_s

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        """See `SharesAccelerator`; one batch is one step."""
        self._take_turn = lock.hold

    async def close(self) -> None:
        """Free everything after the running call; twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._pool, self._free)
        self._pool.shutdown()

    def _free(self) -> None:
        self._llama.llama_free(self._context)
        self._model.close()
