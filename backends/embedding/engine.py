"""The engine of embedding models in every format: batches the inputs of concurrent requests."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineLoad, ModelInfo
from backends.embedding.batch import BatchLimits, QueuedRequest, next_batch
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.activity import NO_ACTIVITY, REQUEST_ID, Activity
from backends.engine.threads import name_this_thread
from backends.engine.waiting import Pace
from backends.limits import UNLIMITED, EngineLimits, StepWatch, deadline
from core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    ImpetusError,
    RequestError,
    UnsupportedCapability,
)
from core.types import BATCH_DELAY_S, Embeddings, GenerationEvent, GenerationRequest, Priority

logger = logging.getLogger(__name__)

THREAD_NAME = "impetus-engine"


class EmbeddingModel(Protocol):
    """A loaded embedding model; opened, used and closed on one thread."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids; requests with others are refused."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text` with the model's special tokens, not truncated."""
        ...

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector per list, float32 (len(token_lists), dimension); blocks.

        They are pooled and normalised as the model wants it.  Lists differ in length and are not
        empty; together they fit the `BatchLimits` of the engine.
        """
        ...

    def close(self) -> None:
        """Free the weights; called once."""
        ...


class EmbeddingEngine(Engine):
    """One resident embedding model on a thread of its own.

    Requests take turns in opening a batch, so a long one delays a short one by one batch.
    """

    def __init__(
        self,
        info: ModelInfo,
        open_model: Callable[[], EmbeddingModel],
        *,
        context_tokens: int,
        batch_limits: BatchLimits,
        max_waiting: int = 256,
    ) -> None:
        """Open the model on the engine's thread; blocks until it is loaded.

        Raises what `open_model` raises.
        """
        self.info = info
        self.context_tokens = context_tokens
        self.max_sequences = 1
        self._batch_limits = batch_limits
        self._max_waiting = max_waiting
        self._wake = threading.Condition()
        self._submitted: deque[QueuedRequest] = deque()
        self._queue: deque[QueuedRequest] = deque()
        self._is_closing = False
        self._limits = UNLIMITED
        self._counters = EngineLoad()
        self._watch, self._pace = StepWatch(), Pace()
        self._take_turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self._activity: Activity = NO_ACTIVITY
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(open_model, opened), name=THREAD_NAME, daemon=True
        )
        self._thread.start()
        opened.result()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Refuse: an embedding model generates no text."""
        raise UnsupportedCapability(
            f"The model {request.model_id} makes embeddings, not text; use /v1/embeddings.",
            param="model",
        )
        yield  # pragma: no cover - makes this an async generator

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Embeddings:
        """Return vectors in order; see `Engine.embed`.

        Raises RequestError, QueueFull, TimedOut, RequestFailed, EngineFailed, Unavailable.
        """
        self._limits.check_admits(is_resumed=False)
        loop = asyncio.get_running_loop()
        due_at = time.monotonic() + (BATCH_DELAY_S if priority == "batch" else 0.0)
        request = QueuedRequest(
            inputs, loop, loop.create_future(), due_at, request_id=REQUEST_ID.get()
        )
        with self._wake:
            if self._is_closing:
                raise self._unloaded()
            if len(self._submitted) + len(self._queue) > self._max_waiting:
                raise self._pace.refusal(self._max_waiting, 1, self.info.name)
            self._submitted.append(request)
            self._wake.notify()
        try:
            async with deadline(deadline_s, "inputs"):
                return await request.done
        finally:
            # The engine's thread drops it before its next batch.
            request.is_over = True

    def set_limits(self, limits: EngineLimits) -> None:
        """Apply `limits`: pauses between batches, and whether new requests are admitted."""
        self._limits = limits

    def load(self) -> EngineLoad:
        """Return the counts of this moment; a step is a batch."""
        waiting = len(self._submitted) + len(self._queue)
        return replace(self._counters, running=min(waiting, 1), waiting=max(waiting - 1, 0))

    @property
    def stalled_s(self) -> float:
        """Seconds since the running batch began; see `backends.limits.Watched`."""
        return self._watch.lasted_s

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        """Hold `lock` during each batch; see `SharesAccelerator`."""
        self._take_turn = lock.hold

    def record_activity(self, activity: Activity) -> None:
        """Report tokenizing and batches to `activity`; see `RecordsActivity`."""
        self._activity = activity

    async def close(self) -> None:
        """Fail the queued requests, free the model after the running batch, join the thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _unloaded(self) -> EngineFailed:
        return EngineFailed(f"The model {self.info.name} was unloaded.")

    def _run(self, open_model: Callable[[], EmbeddingModel], opened: "Future[None]") -> None:
        name_this_thread(THREAD_NAME)
        try:
            model = open_model()
        except BaseException as problem:
            opened.set_exception(problem)
            return
        opened.set_result(None)
        try:
            while self._accept(model):
                self._step(model)
        finally:
            with self._wake:
                self._is_closing = True
                unfinished = [*self._queue, *self._submitted]
                self._queue.clear()
                self._submitted.clear()
            for request in unfinished:
                request.resolve(self._unloaded())
            model.close()

    def _accept(self, model: EmbeddingModel) -> bool:
        """Tokenize new requests; block while there is nothing to do; False when closing."""
        while True:
            with self._wake:
                while not (self._is_closing or self._submitted or self._queue):
                    self._wake.wait()
                if self._is_closing:
                    return False
                if not self._submitted:
                    return True
                self._queue.append(request := self._submitted.popleft())
            self._prepare(model, request)

    def _prepare(self, model: EmbeddingModel, request: QueuedRequest) -> None:
        try:
            for text in request.inputs:
                if request.is_over or self._is_closing:
                    break
                with self._activity.working(request.request_id):
                    ids = self._tokens(model, text)
                request.left.append((len(ids), len(request.token_lists)))
                request.token_lists.append(ids)
        except ImpetusError as problem:
            self._end(request, problem)
        except Exception as problem:
            logger.exception("the tokenizer of %s failed", self.info.name)
            self._end(request, EngineFailed(f"The tokenizer of {self.info.name} failed: {problem}"))
        else:
            request.left.sort()
            self._end_if_done(request)

    def _tokens(self, model: EmbeddingModel, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            # For an empty text, a tokenizer would still return its special tokens.
            ids = model.tokenize(text) if text else []
        else:
            ids = list(text)
            unknown = next((each for each in ids if not 0 <= each < model.vocabulary_size), None)
            if unknown is not None:
                raise RequestError(
                    f"The token id {unknown} is not in the model's vocabulary of "
                    f"{model.vocabulary_size} tokens; send text, or ids of this model's tokenizer.",
                    param="input",
                )
        if not ids:
            raise RequestError("An input is empty; remove it.", param="input")
        if len(ids) > self.context_tokens:
            raise ContextLengthExceeded.of(len(ids), self.context_tokens)
        return ids

    def _step(self, model: EmbeddingModel) -> None:
        """Compute one batch."""
        for request in [request for request in self._queue if request.is_over]:
            self._queue.remove(request)
        batch = next_batch(self._queue, self._batch_limits, time.monotonic())
        if not batch:
            return
        started = time.thread_time()
        try:
            requests = dict.fromkeys(request.request_id for request, _ in batch)
            with self._take_turn(), self._watch.running("batch"), self._activity.working(*requests):
                vectors = self._encode(
                    model, [request.token_lists[index] for request, index in batch]
                )
        except Exception as problem:
            if not isinstance(problem, ImpetusError):
                logger.exception("a batch of %s failed", self.info.name)
                problem = EngineFailed(f"The engine of {self.info.name} failed: {problem}")
            for request in {request for request, _ in batch}:
                self._end(request, problem)
            return
        finally:
            self._counters = replace(
                self._counters,
                steps=self._counters.steps + 1,
                native_cpu_s=self._counters.native_cpu_s + time.thread_time() - started,
            )
        for (request, index), vector in zip(batch, vectors, strict=True):
            if not np.isfinite(vector).all():
                message = (
                    f"The model {self.info.name} computed a non-finite vector (NaN or infinity); "
                    "try another quantization."
                )
                self._end(request, EngineFailed(message))
            request.vectors[index] = vector
        for request in {request for request, _ in batch}:
            self._end_if_done(request)
        self._limits.rest()

    def _encode(self, model: EmbeddingModel, token_lists: list[list[int]]) -> NDArray[np.float32]:
        vectors = np.asarray(model.encode(token_lists), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(token_lists):
            raise EngineFailed(
                f"The model {self.info.name} computed vectors of shape {vectors.shape} for "
                f"{len(token_lists)} inputs."
            )
        return vectors

    def _end_if_done(self, request: QueuedRequest) -> None:
        if not request.is_over and len(request.vectors) == len(request.inputs):
            if request.vectors:
                self._pace.note(time.monotonic() - request.begun_at)
            self._end(request, request.result())

    def _end(self, request: QueuedRequest, outcome: Embeddings | ImpetusError) -> None:
        if request in self._queue:
            self._queue.remove(request)
        request.resolve(outcome)
