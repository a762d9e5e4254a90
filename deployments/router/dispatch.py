"""Dispatches requests to the replica that holds the model, loading the model first if needed."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

from backends.limits import deadline
from core.awake_time import AwakeTimer
from core.errors import EngineFailed, ModelNotResident, TimedOut
from core.types import (
    DEFAULT_EMBEDDING,
    EmbeddingParams,
    Embeddings,
    Finished,
    GenerationRequest,
    Priority,
    Prompt,
    Relevance,
    RerankInputs,
    TokenizedPrompt,
    TokenizeOptions,
)
from deployments.activity import DeathRecords
from deployments.decisions import DecisionLog
from deployments.messages import Attempt, LoadContext, Residency
from deployments.router.attempts import RequestAttempts
from deployments.router.model_states import ModelStatesWatch
from deployments.router.recovery import Recovery
from deployments.router.targets import Targets
from deployments.serve.handles import Handle, ReplicaDied, call, direct, unwrap
from deployments.transport.codec import LENGTH_BYTES, decode_body
from deployments.transport.socket import FrameReceiver
from router.services import EventCallback

logger = logging.getLogger(__name__)

# Cache misses of shorter prompts are not logged.
_NOTED_MISS_TOKENS = 512
_LOST_EVENTS_S = 10.0
# The engine ends a request at its deadline; this is the extra time for its answer.
_DEADLINE_GRACE_S = 2.0


class HandleDispatcher:
    """Runs requests on the replica that holds the model; implements `router.services.Dispatcher`.

    The scheduler is asked only where the model states name no replica, or that replica replied
    that it does not hold the model.
    """

    def __init__(
        self,
        scheduler: Handle,
        formats: Mapping[str, Handle],
        receiver: FrameReceiver,
        node_id: str,
        model_states: ModelStatesWatch,
        deaths: DeathRecords,
        *,
        has_many: bool = False,
        log: DecisionLog | None = None,
    ) -> None:
        """`has_many`: formats may have several replicas, one of which holds the model."""
        self._scheduler = direct(scheduler)
        handles = {name: direct(handle) for name, handle in formats.items()}
        self._targets = Targets(handles, has_many=has_many)
        self._log = log or DecisionLog()
        self._recovery = Recovery(self._scheduler, model_states, self._targets, deaths, self._log)
        self._receiver = receiver
        self._node_id = node_id
        self._model_states = model_states
        self._calls: set[asyncio.Task[None]] = set()
        # While one sequence of a group waits for the model, the others wait for it.
        self._load_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        """Cancel running calls and wait for them."""
        calls = list(self._calls)
        for work in calls:
            work.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        """Run the request, passing its events to `on_events`; see `router.services.Dispatcher`.

        When a replica died or no longer holds the model, another attempt resumes the answer after
        the tokens whose events were passed on; the client does not see this.  A request of which
        the process may have died is sent once more.  Raises CrashingRequest after that.
        """
        recovery = await self._recovery.begin(
            request.model_id,
            request.id,
            LoadContext(priority=request.priority),
            (request.prompt, request.output),
        )
        attempts = RequestAttempts(request, on_events, recovery.note_answer)
        group = request.id if request.group is None else request.group.id
        load_turn = self._load_turns.setdefault(group, asyncio.Lock())
        while True:
            residency = None
            try:
                # A load or a wait for memory must not hold up the other suspects.
                async with load_turn:
                    await self._ensure(request.model_id, recovery.context, attempts)
                async with recovery.turn():
                    residency = await self._ensure(request.model_id, recovery.context, attempts)
                    is_local = residency.node_id == self._node_id
                    run = self._run_locally if is_local else self._run_remotely
                    remaining = attempts.remaining_request(recovery.attempt_id)
                    await run(remaining, residency, attempts, recovery.attempt(residency))
                self._note_end(request.model_id, attempts.finished)
                return
            except (ModelNotResident, ReplicaDied) as problem:
                attempts.note_lost(problem)
                await recovery.recover(
                    problem,
                    residency,
                    has_begun=attempts.has_begun,
                    can_resume=attempts.can_resume,
                )

    def _note_end(self, model_id: str, end: Finished | None) -> None:
        """Log tool calls that do not match their schema, and long prompts that were not reused."""
        if end is None:
            return
        if end.mismatches:
            kinds = ", ".join(sorted(set(end.mismatches)))
            self._log.record("tool call", f"pass on {model_id}", f"calls do not fit: {kinds}")
        cache, computed = end.cache, end.usage.prompt_tokens - end.usage.cached_tokens
        if cache is not None and cache.miss is not None and computed >= _NOTED_MISS_TOKENS:
            where = "" if cache.diverged_at is None else f" at token {cache.diverged_at}"
            reason = f"{computed} tokens were not reused: {cache.miss.replace('_', ' ')}{where}"
            self._log.record("cache miss", f"compute the prompt for {model_id}", reason)

    async def _run_locally(
        self,
        request: GenerationRequest,
        residency: Residency,
        attempts: RequestAttempts,
        attempt: Attempt,
    ) -> None:
        """Run on this machine: events come over the socket, the call only reports its end."""
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        attempts.begin(end)
        self._receiver.subscribe(request.id, attempts.on_events, partial(_fail, end))
        timer = self._end_in_time(request, end)
        work = asyncio.ensure_future(self._call(request, residency, attempt, end))
        self._calls.add(work)
        work.add_done_callback(self._calls.discard)
        is_finished = False
        try:
            await end
            is_finished = True
        finally:
            self._receiver.unsubscribe(request.id)
            if timer is not None:
                timer.cancel()
            # The call of a finished request returns by itself; any other is cancelled.
            if not is_finished:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    @staticmethod
    def _end_in_time(request: GenerationRequest, end: "asyncio.Future[None]") -> AwakeTimer | None:
        """Fail the request shortly after its deadline, in case its whole process hangs."""
        if request.deadline_s is None:
            return None
        late = TimedOut.after(request.deadline_s)
        return AwakeTimer(request.deadline_s + _DEADLINE_GRACE_S, _fail, end, late)

    async def _call(
        self,
        request: GenerationRequest,
        residency: Residency,
        attempt: Attempt,
        end: "asyncio.Future[None]",
    ) -> None:
        handle = self._targets.at(residency)
        try:
            await call(handle.generate.remote(request, self._receiver.path, attempt))
        except Exception as problem:
            _fail(end, problem)
        else:
            # Events are sent before the call returns; report it if the last one never arrives.
            lost = EngineFailed("The end of the answer was lost; send the request again.")
            AwakeTimer(_LOST_EVENTS_S, _fail, end, lost)

    async def _run_remotely(
        self,
        request: GenerationRequest,
        residency: Residency,
        attempts: RequestAttempts,
        attempt: Attempt,
    ) -> None:
        """Run on another machine: event frames come over the handle."""
        attempts.begin()
        handle = self._targets.at(residency).options(stream=True)
        frames: Any = handle.stream.remote(request, attempt)
        try:
            async for frame in frames:
                for _, arrival in decode_body(frame[LENGTH_BYTES:]):
                    if isinstance(arrival, EngineFailed):
                        raise arrival
                    attempts.on_events(arrival)
        except Exception as problem:
            ours = unwrap(problem)
            if ours is problem:
                raise
            raise ours from problem
        finally:
            frames.cancel()

    async def embed(
        self,
        model_id: str,
        inputs: Sequence[str | Sequence[int]],
        priority: Priority = "interactive",
        deadline_s: float | None = None,
        params: EmbeddingParams = DEFAULT_EMBEDDING,
    ) -> Embeddings:
        """Return one vector per input; a lost replica costs another attempt."""
        need = LoadContext(priority=priority)
        async with deadline(_latest(deadline_s), "inputs"):
            embeddings: Embeddings = await self._ask(
                "embed", need, model_id, inputs, priority, deadline_s, params
            )
        return embeddings

    async def rerank(
        self,
        model_id: str,
        inputs: RerankInputs,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Relevance:
        """Return one score per document; a lost replica costs another attempt."""
        need = LoadContext(priority=priority)
        async with deadline(_latest(deadline_s), "documents"):
            relevance: Relevance = await self._ask(
                "rerank", need, model_id, inputs, priority, deadline_s
            )
        return relevance

    async def count_tokens(
        self, model_id: str, prompt: Prompt, deadline_s: float | None = None
    ) -> int:
        """Return the length of `prompt` in tokens; a lost replica costs another attempt."""
        async with deadline(_latest(deadline_s), "messages"):
            count: int = await self._ask(
                "count_tokens", LoadContext(), model_id, prompt, deadline_s
            )
        return count

    async def tokenize(
        self,
        model_id: str,
        prompt: Prompt,
        options: TokenizeOptions,
        deadline_s: float | None = None,
    ) -> TokenizedPrompt:
        """Return a prompt's text and tokens; a lost replica costs another attempt."""
        async with deadline(_latest(deadline_s), "prompt"):
            tokenized: TokenizedPrompt = await self._ask(
                "tokenize", LoadContext(), model_id, prompt, options, deadline_s
            )
        return tokenized

    async def _ask(self, method: str, need: LoadContext, model_id: str, *arguments: Any) -> Any:
        """Call a method of the replica that holds the model, loading the model first if needed."""
        recovery = await self._recovery.begin(model_id, uuid4().hex, need, (method, arguments[0]))
        while True:
            residency = None
            try:
                await self._ensure(model_id, recovery.context)
                async with recovery.turn():
                    residency = await self._ensure(model_id, recovery.context)
                    remote = getattr(self._targets.at(residency), method).remote
                    attempt = recovery.attempt(residency)
                    return await call(remote(model_id, *arguments, attempt))
            except (ModelNotResident, ReplicaDied) as problem:
                await recovery.recover(problem, residency)

    async def _ensure(
        self, model_id: str, need: LoadContext, attempts: RequestAttempts | None = None
    ) -> Residency:
        known = self._model_states.residencies.get(model_id)
        if known is not None:
            return known
        asked_at = time.monotonic()
        try:
            residency: Residency = await call(self._scheduler.ensure_loaded.remote(model_id, need))
        except ReplicaDied as problem:
            # The scheduler returns the death of a model's process; a cause means its own death.
            if problem.__cause__ is not None:
                problem.is_bystander = True
            raise
        self._model_states.note_loaded(residency)
        if attempts is not None:
            attempts.note_wait(time.monotonic() - asked_at, residency)
        return residency


def _latest(deadline_s: float | None) -> float | None:
    """Return when a call ends here, in case its whole process hangs; the engine ends it before."""
    return None if deadline_s is None else deadline_s + _DEADLINE_GRACE_S


def _fail(end: "asyncio.Future[None]", problem: BaseException) -> None:
    if not end.done():
        end.set_exception(problem)
