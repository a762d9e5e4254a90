"""The engine of embedding models of every format; requests share batches."""

import asyncio
import logging
import math
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineLoad, ModelInfo
from backends.embedding.pooling import Pooling, pool, read_pooling
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.threads import name_this_thread
from backends.engine.waiting import Pace
from backends.limits import UNLIMITED, EngineLimits, StepWatch
from core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    ImpetusError,
    RequestError,
    UnsupportedCapability,
)
from core.types import BATCH_DELAY_S, Embeddings, GenerationEvent, GenerationRequest, Priority

__all__ = ["EmbeddingEngine", "Pooling", "pool", "read_pooling"]

logger = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """One request; `left` are (tokens, index) of what is not computed, the shortest first.

    One that is not due yet, by the monotonic clock, lets others go first.  `begun_at` is when the
    first batch with some of it began.
    """

    inputs: Sequence[str | Sequence[int]]
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[Embeddings]"
    due_at: float = 0.0
    token_lists: list[list[int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    is_over: bool = False
    begun_at: float = math.inf

    def result(self) -> Embeddings:
        """Return the vectors in the order of the inputs."""
        rows = [self.vectors[index] for index in range(len(self.token_lists))]
        vectors = np.stack(rows) if rows else np.empty((0, 0), np.float32)
        return Embeddings(vectors, sum(map(len, self.token_lists)))

    def resolve(self, outcome: Embeddings | ImpetusError) -> None:
        """Hand the result to the waiting task; callable from any thread."""
        self.is_over = True

        def settle() -> None:
            if self.done.done():
                return
            if isinstance(outcome, Embeddings):
                self.done.set_result(outcome)
            else:
                self.done.set_exception(outcome)

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            logger.debug("the loop of an embedding request is closed")


class EmbeddingEngine(Engine):
    """One resident embedding model; `tokenize`, `encode` and `close` run on one thread of its own.

    `tokenize` gives a text's ids with the model's special tokens, uncut.  `encode` takes token
    lists of different lengths and returns their vectors, float32 (len(lists), dimension), pooled
    and normalised as the model wants it; rows x longest list is at most `max_batch_tokens`, but
    for a single longer list.  Requests take turns in opening a batch, so a long one delays a
    short one by one batch.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenize: Callable[[str], list[int]],
        encode: Encode,
        close: Callable[[], None],
        *,
        context_tokens: int,
        vocabulary_size: int,
        max_batch_tokens: int,
        max_waiting: int = 256,
    ) -> None:
        """Start the thread; the model is loaded already."""
        self.info = info
        self.context_tokens = context_tokens
        self.max_sequences = 1
        self._tokenize = tokenize
        self._encode = encode
        self._free = close
        self._vocabulary_size = vocabulary_size
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting = max_waiting
        self._wake = threading.Condition()
        self._submitted: deque[EmbeddingJob] = deque()
        self._jobs: deque[EmbeddingJob] = deque()
        self._is_closing = False
        self._limits = UNLIMITED
        self._counters = EngineLoad()
        self._watch, self._pace = StepWatch(), Pace()
        self._take_turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self._thread = threading.Thread(target=self._run, name="impetus-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Refuse: an embedding model generates no text."""
        raise UnsupportedCapability(
            f"The model {request.model_id} makes embeddings, not text.", param="model"
        )
        yield  # pragma: no cover - makes this an async generator

    async def embed(
        self, inputs: Sequence[str | Sequence[int]], priority: Priority = "interactive"
    ) -> Embeddings:
        """Return vectors in order; see `Engine.embed`.

        Cancelling drops what is not computed yet.  Raises RequestError, QueueFull, EngineFailed.
        """
        self._limits.check_admits(is_resumed=False)
        loop = asyncio.get_running_loop()
        due_at = time.monotonic() + (BATCH_DELAY_S if priority == "batch" else 0.0)
        job = EmbeddingJob(inputs, loop, loop.create_future(), due_at)
        with self._wake:
            if self._is_closing:
                raise EngineFailed(f"The model {self.info.name} was unloaded.")
            if len(self._submitted) + len(self._jobs) > self._max_waiting:
                raise self._pace.refusal(self._max_waiting, 1, self.info.name)
            self._submitted.append(job)
            self._wake.notify()
        try:
            return await job.done
        finally:
            job.is_over = True

    def set_limits(self, limits: EngineLimits) -> None:
        """Obey `limits`: pause between batches, and take nothing new where they say so."""
        self._limits = limits

    def load(self) -> EngineLoad:
        """Return the counts of this moment; a step is a batch."""
        waiting = len(self._submitted) + len(self._jobs)
        return replace(self._counters, running=min(waiting, 1), waiting=max(waiting - 1, 0))

    @property
    def stalled_s(self) -> float:
        """How long the running batch has lasted; see `backends.limits.Watched`."""
        return self._watch.lasted_s

    def share_accelerator(self, lock: AcceleratorLock) -> None:
        """See `SharesAccelerator`; one batch is one step."""
        self._take_turn = lock.hold

    async def close(self) -> None:
        """Fail what waits, free the model after the running batch, join the thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        name_this_thread("impetus-engine")
        try:
            while self._take():
                self._step()
        finally:
            with self._wake:
                self._is_closing = True
                unfinished = [*self._jobs, *self._submitted]
                self._jobs.clear()
                self._submitted.clear()
            for job in unfinished:
                job.resolve(EngineFailed(f"The model {self.info.name} was unloaded."))
            self._free()

    def _take(self) -> bool:
        """Tokenize new requests; wait while there is nothing to do; False when closing."""
        while True:
            with self._wake:
                while not (self._is_closing or self._submitted or self._jobs):
                    self._wake.wait()
                if self._is_closing:
                    return False
                if not self._submitted:
                    return True
                self._jobs.append(job := self._submitted.popleft())
            self._prepare(job)

    def _prepare(self, job: EmbeddingJob) -> None:
        try:
            for text in job.inputs:
                if job.is_over or self._is_closing:
                    break
                ids = self._tokens(text)
                job.left.append((len(ids), len(job.token_lists)))
                job.token_lists.append(ids)
        except ImpetusError as problem:
            self._end(job, problem)
        except Exception as problem:
            logger.exception("the tokenizer of %s failed", self.info.name)
            self._end(job, EngineFailed(f"The tokenizer of {self.info.name} failed: {problem}"))
        else:
            job.left.sort()
            self._end_if_done(job)

    def _tokens(self, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            # Of nothing, a tokenizer still makes its special tokens.
            ids = self._tokenize(text) if text else []
        else:
            ids = list(text)
            if any(not 0 <= token_id < self._vocabulary_size for token_id in ids):
                raise RequestError(
                    f"A token id is outside the {self._vocabulary_size} of the vocabulary.",
                    param="input",
                )
        if not ids:
            raise RequestError("An input is empty.", param="input")
        if len(ids) > self.context_tokens:
            raise ContextLengthExceeded.of(len(ids), self.context_tokens)
        return ids

    def _step(self) -> None:
        """Compute one batch."""
        for job in [job for job in self._jobs if job.is_over]:
            self._jobs.remove(job)
        batch = self._next_batch()
        if not batch:
            return
        started = time.thread_time()
        try:
            with self._take_turn(), self._watch:
                vectors = self._compute([job.token_lists[index] for job, index in batch])
        except Exception as problem:
            if not isinstance(problem, ImpetusError):
                logger.exception("a batch of %s failed", self.info.name)
                problem = EngineFailed(f"The engine of {self.info.name} failed: {problem}")
            for job in {job for job, _ in batch}:
                self._end(job, problem)
            return
        finally:
            self._counters = replace(
                self._counters,
                steps=self._counters.steps + 1,
                native_cpu_s=self._counters.native_cpu_s + time.thread_time() - started,
            )
        for (job, index), vector in zip(batch, vectors, strict=True):
            if not np.isfinite(vector).all():
                message = f"The model {self.info.name} computed a non-finite vector."
                self._end(job, EngineFailed(message))
            job.vectors[index] = vector
        for job in {job for job, _ in batch}:
            self._end_if_done(job)
        self._limits.rest()

    def _next_batch(self) -> list[tuple[EmbeddingJob, int]]:
        """Take the next job's longest input, and what is not longer until the batch is full."""
        if not self._jobs:
            return []
        now = time.monotonic()
        self._let_due_first(now)
        longest = self._jobs[0].left[-1][0]
        room = max(self._max_batch_tokens // longest, 1)
        batch: list[tuple[EmbeddingJob, int]] = []
        for job in self._jobs:
            end = bisect_right(job.left, (longest, len(job.token_lists)))
            start = max(end - (room - len(batch)), 0)
            batch += [(job, index) for _, index in job.left[start:end]]
            del job.left[start:end]
            job.begun_at = min(job.begun_at, now)
            if len(batch) == room:
                break
        self._jobs.rotate(-1)
        return batch

    def _let_due_first(self, now: float) -> None:
        """Put the jobs that are due before those that are not, else as they are."""
        if self._jobs[0].due_at > now:
            self._jobs = deque(sorted(self._jobs, key=lambda job: job.due_at > now))

    def _compute(self, token_lists: list[list[int]]) -> NDArray[np.float32]:
        vectors = np.asarray(self._encode(token_lists), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(token_lists):
            raise EngineFailed(
                f"The model {self.info.name} computed vectors of shape {vectors.shape} for "
                f"{len(token_lists)} inputs."
            )
        return vectors

    def _end_if_done(self, job: EmbeddingJob) -> None:
        if not job.is_over and len(job.vectors) == len(job.inputs):
            if job.vectors:
                self._pace.note(time.monotonic() - job.begun_at)
            self._end(job, job.result())

    def _end(self, job: EmbeddingJob, outcome: Embeddings | ImpetusError) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        job.resolve(outcome)
