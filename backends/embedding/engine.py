"""The engine of embedding and reranking models: batches the inputs of concurrent requests."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np

from backends.base import Engine, EngineLoad, ModelInfo
from backends.cancellation import Cancelled
from backends.embedding.batch import Batch, BatchLimits, QueuedRequest, next_batch
from backends.embedding.inputs import InputTokens
from backends.embedding.model import EmbeddingModel, PairModel, encode, input_tokens
from backends.embedding.pairs import pair_tokens
from backends.embedding.pooling import unit
from backends.embedding.prompts import Prompts
from backends.embedding.trial import depends_on_padding
from backends.engine.accelerator_lock import AcceleratorLock
from backends.engine.activity import NO_ACTIVITY, REQUEST_ID, Activity
from backends.engine.failures import RuntimeLost, request_error
from backends.engine.preparation import Job, PreparationThreads
from backends.engine.threads import name_this_thread
from backends.engine.waiting import Pace
from backends.limits import UNLIMITED, EngineLimits, deadline
from backends.watch import StepWatch
from core.errors import (
    EngineFailed,
    ImpetusError,
    NonFiniteOutput,
    RequestError,
    UnsupportedCapability,
)
from core.types import (
    BATCH_DELAY_S,
    DEFAULT_EMBEDDING,
    Capability,
    EmbeddingParams,
    Embeddings,
    GenerationEvent,
    GenerationRequest,
    Priority,
    Relevance,
    RerankInputs,
    Truncation,
)

logger = logging.getLogger(__name__)

THREAD_NAME = "impetus-engine"


class EmbeddingEngine(Engine):
    """One resident embedding or reranking model on a thread of its own.

    Requests are tokenized on other threads.  They take turns in opening a batch, so a long one
    delays a short one by one batch.  What fails for one request ends it alone; each accepted
    request is resolved, or was cancelled or timed out before.
    """

    def __init__(
        self,
        info: ModelInfo,
        open_model: Callable[[], EmbeddingModel],
        *,
        context_tokens: int,
        batch_limits: BatchLimits,
        max_waiting: int = 256,
        prompts: Prompts | None = None,
        truncates: Truncation = "end",
        is_unit: bool = True,
        tries_padding: bool = False,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the model on the engine's thread; blocks until it is loaded.

        `truncates` is the end at which inputs are cut that are too long, unless a request says
        otherwise.  `is_unit`: the vectors have the length 1, also after `dimensions`.
        `tries_padding`: compare a padded row with the same row alone first, and compute rows of
        one length together if they differ.  `interrupt`: see `BatchingEngine`.  Raises what
        `open_model` raises, and BrokenModel.
        """
        self.info = info
        self.context_tokens = context_tokens
        self.max_sequences = 1
        self._batch_limits = batch_limits
        self._prompts = prompts or Prompts()
        self._truncates, self._is_unit, self._tries_padding = truncates, is_unit, tries_padding
        self._max_waiting, self._interrupt = max_waiting, interrupt
        self._wake = threading.Condition()
        # Requests go from one to the next; the lock guards the first two.
        self._tokenizing: set[QueuedRequest] = set()
        self._submitted: deque[QueuedRequest] = deque()
        self._queue: deque[QueuedRequest] = deque()
        self._is_closing = False
        self._failure: EngineFailed | None = None
        self._limits = UNLIMITED
        self._counters = EngineLoad()
        self._watch, self._pace = StepWatch(), Pace()
        self._threads = PreparationThreads(self._watch)
        self._take_turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self._activity: Activity = NO_ACTIVITY
        opened: Future[EmbeddingModel] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(open_model, opened), name=THREAD_NAME, daemon=True
        )
        self._thread.start()
        self._model = opened.result()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Refuse: the model generates no text."""
        use = (
            "scores, not text; use /v1/rerank"
            if self._reranks
            else "embeddings, not text; use /v1/embeddings"
        )
        raise UnsupportedCapability(f"The model {request.model_id} makes {use}.", param="model")
        yield  # pragma: no cover - makes this an async generator

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        priority: Priority = "interactive",
        deadline_s: float | None = None,
        params: EmbeddingParams = DEFAULT_EMBEDDING,
    ) -> Embeddings:
        """Return vectors in order; see `Engine.embed`.

        Raises RequestError, QueueFull, TimedOut, RequestFailed, EngineFailed, Unavailable.
        """
        if self._reranks:
            return await super().embed(inputs, priority, deadline_s, params)
        prompt = self._prompts.choose(params)
        tokens = self._input_tokens(inputs, prompt, params)
        made = await self._run_request(inputs, tokens, priority, deadline_s)
        return self._shortened(made, params.dimensions)

    async def rerank(
        self,
        inputs: RerankInputs,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Relevance:
        """Return scores in order; see `Engine.rerank`.

        Raises RequestError, QueueFull, TimedOut, RequestFailed, EngineFailed, Unavailable.
        """
        model = self._model
        if not (self._reranks and isinstance(model, PairModel)):
            return await super().rerank(inputs, priority, deadline_s)
        tokens = pair_tokens(model, inputs, self.context_tokens, self._truncates)
        made = await self._run_request(inputs.documents, tokens, priority, deadline_s)
        scores = made.vectors.reshape(len(inputs.documents), -1)[:, 0]
        return Relevance(scores, made.prompt_tokens, made.truncated_tokens)

    @property
    def _reranks(self) -> bool:
        return Capability.RERANK in self.info.capabilities

    @property
    def _outputs(self) -> str:
        return "scores" if self._reranks else "vectors"

    def _input_tokens(
        self, inputs: Sequence[str | Sequence[int]], prompt: str, params: EmbeddingParams
    ) -> Iterator[InputTokens]:
        """Tokenize the inputs one by one, on the thread that asks for them."""
        model = self._model
        side = self._truncates if params.truncate == "default" else params.truncate
        unpooled = 0
        if prompt and not self._prompts.is_pooled:
            unpooled = len(model.tokenize("", prompt)) - len(model.special_tokens[1])
        for index, text in enumerate(inputs):
            name = f"input[{index}]"
            ids = input_tokens(model, text, self.context_tokens, side, prompt=prompt, name=name)
            # A row has at least one token to pool.
            ids.unpooled = min(unpooled, len(ids) - 1) if isinstance(text, str) else 0
            yield ids

    def _shortened(self, made: Embeddings, dimensions: int | None) -> Embeddings:
        """Return the first `dimensions` numbers of each vector, of length 1 where all are."""
        if dimensions is None or not len(made.vectors):
            return made
        dimension = made.vectors.shape[1]
        if dimensions > dimension:
            raise RequestError(
                f"dimensions is {dimensions}, but the vectors of {self.info.name} have "
                f"{dimension} numbers; send 1 to {dimension}.",
                param="dimensions",
            )
        vectors = made.vectors[:, :dimensions]
        return replace(made, vectors=unit(vectors) if self._is_unit else vectors)

    async def _run_request(
        self,
        inputs: Sequence[object],
        tokens: Iterable[InputTokens],
        priority: Priority,
        deadline_s: float | None,
    ) -> Embeddings:
        """Queue a request and wait for its vectors."""
        self._limits.check_admits(is_resumed=False)
        loop = asyncio.get_running_loop()
        due_at = time.monotonic() + (BATCH_DELAY_S if priority == "batch" else 0.0)
        request = QueuedRequest(
            inputs, loop, loop.create_future(), due_at, tokens, request_id=REQUEST_ID.get()
        )
        with self._wake:
            if self._is_closing:
                raise self._ended()
            if self._waiting > self._max_waiting:
                raise self._pace.refusal(self._max_waiting, 1, self.info.name)
            self._tokenizing.add(request)
        job: Job[None] | None = None
        try:
            job = self._threads.submit(lambda: self._tokenize(request))
            job.done.add_done_callback(lambda done: _end_unprepared(request, done))
            async with deadline(deadline_s, "inputs"):
                return await request.done
        finally:
            # The engine's thread drops it before its next batch.
            request.is_over = True
            self._forget(request, job)

    def set_limits(self, limits: EngineLimits) -> None:
        """Apply `limits`: pauses between batches, and whether new requests are admitted."""
        self._limits = limits

    def load(self) -> EngineLoad:
        """Return the counts of this moment; a step is a batch."""
        waiting = self._waiting
        return replace(self._counters, running=min(waiting, 1), waiting=max(waiting - 1, 0))

    @property
    def _waiting(self) -> int:
        return len(self._tokenizing) + len(self._submitted) + len(self._queue)

    @property
    def is_failed(self) -> bool:
        """Whether the engine's thread ended although nobody closed the engine."""
        return self._failure is not None

    @property
    def stalled_s(self) -> float:
        """Seconds since the running batch, tokenizing or closing began; see `Watched`."""
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
        self._interrupt()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _ended(self) -> EngineFailed:
        """Return the error of requests that come too late."""
        if self._failure is not None:
            return EngineFailed(self._failure.message)
        return EngineFailed(f"The model {self.info.name} was unloaded.")

    def _run(
        self, open_model: Callable[[], EmbeddingModel], opened: "Future[EmbeddingModel]"
    ) -> None:
        name_this_thread(THREAD_NAME)
        try:
            model = open_model()
            if self._tries_padding and depends_on_padding(model, self.context_tokens):
                logger.info("%s: rows of different lengths are not padded", self.info.name)
                self._batch_limits = replace(self._batch_limits, equal_lengths=True)
        except BaseException as problem:
            opened.set_exception(problem)
            return
        opened.set_result(model)
        try:
            while self._accept():
                self._step(model)
        except BaseException as problem:
            # A batch that `close` interrupts raises as well.
            if not self._is_closing:
                logger.exception("engine of %s failed", self.info.name)
                reason = f"The engine of {self.info.name} failed: {str(problem)[:500]}"
                self._failure = EngineFailed(reason)
        finally:
            self._shut_down(model)

    def _shut_down(self, model: EmbeddingModel) -> None:
        with self._wake:
            self._is_closing = True
            unfinished = [*self._queue, *self._submitted, *self._tokenizing]
            for queue in (self._queue, self._submitted, self._tokenizing):
                queue.clear()
        for request in unfinished:
            request.resolve(self._ended())
        try:
            with self._watch.running("close"):
                # They use the model's vocabulary.
                self._threads.close()
                model.close()
        except BaseException:
            logger.exception("%s: the model cannot be closed", self.info.name)

    def _accept(self) -> bool:
        """Take the tokenized requests; block while there is nothing to do; False when closing."""
        with self._wake:
            while not (self._is_closing or self._submitted or self._queue):
                self._wake.wait()
            accepted = list(self._submitted)
            self._submitted.clear()
            self._queue.extend(accepted)
        for request in accepted:
            self._end_if_done(request)
        return not self._is_closing

    def _tokenize(self, request: QueuedRequest) -> None:
        """Tokenize the inputs and submit the request; runs on a thread for preparation."""
        try:
            with self._activity.working(request.request_id):
                for ids in request.tokens:
                    if request.is_over:
                        return
                    request.left.append((len(ids), len(request.token_lists)))
                    request.token_lists.append(ids)
            request.left.sort()
        except Cancelled:
            raise
        except BaseException as problem:
            request.resolve(request_error(problem, "tokenization", request.label))
            return
        with self._wake:
            # It is not there any more if it has ended meanwhile.
            if request in self._tokenizing:
                self._tokenizing.remove(request)
                self._submitted.append(request)
                self._wake.notify()

    def _forget(self, request: QueuedRequest, job: Job[None] | None) -> None:
        if job is not None:
            job.cancel()
        with self._wake:
            self._tokenizing.discard(request)

    def _step(self, model: EmbeddingModel) -> None:
        """Compute one batch."""
        for request in [request for request in self._queue if request.is_over]:
            self._queue.remove(request)
        batch = next_batch(self._queue, self._batch_limits, time.monotonic())
        if not batch:
            return
        requests = list(dict.fromkeys(request for request, _ in batch))
        problems = self._compute(model, batch)
        if problems and len(requests) > 1:
            # One input may spoil a whole batch, so the requests that failed are computed apart.
            suspects, problems = problems, {}
            for request in [request for request in suspects if not request.is_over]:
                problems |= self._compute(model, [item for item in batch if item[0] is request])
        for request, problem in problems.items():
            self._end(request, request_error(problem, "its computation", request.label))
        for request in requests:
            self._end_if_done(request)
        self._limits.rest()

    def _compute(self, model: EmbeddingModel, batch: Batch) -> dict[QueuedRequest, BaseException]:
        """Compute a batch and note its vectors; return the requests that failed, and why."""
        requests = dict.fromkeys(request for request, _ in batch)
        ids = dict.fromkeys(request.request_id for request in requests)
        token_lists = [request.token_lists[index] for request, index in batch]
        started = time.thread_time()
        try:
            with self._take_turn(), self._watch.running("batch"), self._activity.working(*ids):
                vectors = encode(model, token_lists, self.info.name)
        except RuntimeLost:
            raise
        except BaseException as problem:
            return dict.fromkeys(requests, problem)
        finally:
            self._counters = replace(
                self._counters,
                steps=self._counters.steps + 1,
                native_cpu_s=self._counters.native_cpu_s + time.thread_time() - started,
            )
        problems: dict[QueuedRequest, BaseException] = {}
        for (request, index), vector in zip(batch, vectors, strict=True):
            request.vectors[index] = vector
            if not np.isfinite(vector).all():
                problems[request] = NonFiniteOutput.of(self._outputs, self.info.name)
        return problems

    def _end_if_done(self, request: QueuedRequest) -> None:
        if not request.is_over and len(request.vectors) == len(request.inputs):
            if request.vectors:
                self._pace.note(time.monotonic() - request.begun_at)
            self._end(request, request.result())

    def _end(self, request: QueuedRequest, outcome: Embeddings | ImpetusError) -> None:
        if request in self._queue:
            self._queue.remove(request)
        request.resolve(outcome)


def _end_unprepared(request: QueuedRequest, done: "Future[None]") -> None:
    """End a request whose tokenization failed, also before it began: no thread was left for it."""
    problem = None if done.cancelled() else done.exception()
    if problem is not None:
        request.resolve(request_error(problem, "tokenization", request.label))
