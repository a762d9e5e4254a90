"""The interfaces that every model format implements: `Backend` and `Engine`."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.prefixes.store import ModelPrefixStore
from backends.trials import TrialOptions
from core.errors import UnsupportedCapability
from core.types import (
    DEFAULT_EMBEDDING,
    Capability,
    EmbeddingParams,
    Embeddings,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Priority,
    Relevance,
    RerankInputs,
)
from core.units import MIB

# Gets a prompt's position and the logits (vocabulary,) after its token; valid during the call.
OnLogits: TypeAlias = Callable[[int, NDArray[np.float32]], None]


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on this machine; `reason` tells the user why not."""

    is_available: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RuntimeChoice:
    """The library that runs a model, and why, for formats that more than one can run.

    `alternative` is the other runtime if it can run the model too, empty if it cannot;
    `alternative_reason` says why it was not chosen.
    """

    runtime: str
    reason: str
    alternative: str = ""
    alternative_reason: str = ""

    def resolve(self, wanted: str | None) -> str:
        """Return the runtime to use if a user's setting asks for `wanted`, None if there is none.

        A runtime that cannot run the model is not used, even if it was set earlier.
        """
        return wanted if wanted and wanted == self.alternative else self.runtime


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's metadata, read from its files without loading them.

    `files` are absolute paths, with the one to open first; `context_length` is the trained length
    in tokens, or less if the runtime of `choice` can use only less.  `tool_template` and
    `rag_template` are those named `tool_use` and `rag`, if the model has them beside
    `chat_template`.  `details` is for the backend's own use, JSON-serializable.
    """

    format: str
    name: str
    architecture: str
    quantization: str
    files: tuple[Path, ...]
    size_bytes: int
    parameters: int
    context_length: int
    capabilities: frozenset[Capability]
    license: str = ""
    chat_template: str | None = None
    tool_template: str | None = None
    rag_template: str | None = None
    details: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    choice: RuntimeChoice | None = None


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """Limits of a process that computes for one model.

    `load_limit_s` and `step_limit_s` are the seconds that it may take to open its model and to
    compute once.  `compiled_folder` keeps what it compiled of models; None: nothing is kept.
    """

    load_limit_s: float = 3600.0
    step_limit_s: float = 3600.0
    compiled_folder: Path | None = None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options for opening a model.

    `context_tokens` None means the trained length; with `kv_tokens` and `kv_type` None the backend
    chooses the KV cells that all sequences share.  `memory_limit_bytes` limits what `estimate`
    grants.  `prefix_bytes` is RAM for prefixes outside the KV cells; up to `warm_tokens` also stay
    in the cells.  `prefix_store` keeps prefixes beyond the engine's lifetime.  `stable_prompts`:
    see `backends.prompt.normalize`.  `tool_parser` overrides the tool-call family of the template,
    `runtime` the runtime of `ModelInfo.choice`.  `trial` is how the engine tries the model; None:
    with results of this process alone.  `child` is for formats that compute in a child process.
    `deterministic`: sequences run one at a time, in fixed prompt pieces of `prefill_chunk_tokens`,
    so that an answer depends on its request alone.
    """

    max_sequences: int = 16
    max_waiting: int = 256
    threads: int = 1
    prefill_chunk_tokens: int = 512
    context_tokens: int | None = None
    kv_tokens: int | None = None
    kv_type: str | None = None
    memory_limit_bytes: int | None = None
    prefix_bytes: int = 0
    warm_tokens: int = 1 << 30
    tool_parser: str | None = None
    runtime: str | None = None
    prefix_store: ModelPrefixStore | None = field(default=None, compare=False)
    trial: TrialOptions | None = field(default=None, compare=False)
    child: ChildOptions = field(default_factory=ChildOptions, compare=False)
    stable_prompts: bool = True
    deterministic: bool = False

    def granted(self, estimate: "MemoryEstimate") -> "EngineOptions":
        """Return these options with the context and cache sizes of `estimate`."""
        return replace(
            self,
            context_tokens=estimate.context_tokens,
            kv_tokens=estimate.kv_tokens,
            prefix_bytes=estimate.prefix_bytes,
            warm_tokens=estimate.warm_tokens,
        )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory that a model needs once open, with the context that fits into it.

    `prefix_bytes` and `warm_tokens`: see `EngineOptions`.
    """

    weights_bytes: int
    kv_bytes: int
    transient_bytes: int
    context_tokens: int
    kv_tokens: int
    prefix_bytes: int = 0
    warm_tokens: int = 1 << 30

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return self.weights_bytes + self.kv_bytes + self.transient_bytes + self.prefix_bytes


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's current load; all counts are instantaneous."""

    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    kv_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    native_cpu_s: float = 0.0


class EventReceiver(Protocol):
    """Receiver of an engine's events; called on the engine's thread once per step, never blocks."""

    def deliver(self, batch: Seq[tuple[str, Seq[GenerationEvent]]]) -> None:
        """Deliver a step's events as (request id, events) pairs.

        If it raises, nothing of `batch` was delivered: the engine then delivers the requests one by
        one, and ends those whose events raise again.
        """
        ...


class Engine(ABC):
    """One model in memory.  Opened on a loader thread, then used from one event loop.

    `limitations` tell the user, a sentence each, what it does otherwise than usual with this model.
    """

    info: ModelInfo
    context_tokens: int
    max_sequences: int
    limitations: tuple[str, ...] = ()

    @property
    def is_failed(self) -> bool:
        """Whether the engine is unusable and must be opened again."""
        return False

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Run a request and yield its events; the last is always `Finished`.

        Closing the generator aborts the sequence and frees its KV cache within one step.  Before
        the first event, raises ContextLengthExceeded, RequestError, QueueFull, BrokenModel; after
        it RequestFailed if this request alone failed, else EngineFailed.
        """

    async def stream_to(self, request: GenerationRequest, receiver: EventReceiver) -> Finished:
        """Run `request` and deliver its events to `receiver`; return the last one.

        Cancelling the task aborts the sequence.  Raises as `generate` does.
        """
        events = self.generate(request)
        try:
            async for event in events:
                receiver.deliver([(request.id, [event])])
                if isinstance(event, Finished):
                    return event
        finally:
            await events.aclose()
        raise asyncio.CancelledError

    async def embed(
        self,
        inputs: Seq[str | Seq[int]],
        priority: Priority = "interactive",
        deadline_s: float | None = None,
        params: EmbeddingParams = DEFAULT_EMBEDDING,
    ) -> Embeddings:
        """Return one vector per text or token ids, in order.

        Cancelling ends the work within one batch, and so does the deadline, in seconds from now.
        Raises ContextLengthExceeded, RequestError for params that the model does not have,
        TimedOut.
        """
        del inputs, priority, deadline_s, params
        raise UnsupportedCapability(
            f"The model {self.info.name} ({self.info.format}) cannot compute embeddings; use "
            "one with the capability embedding in /v1/models.",
            param="model",
        )

    async def rerank(
        self,
        inputs: RerankInputs,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Relevance:
        """Return one score per document, in order.

        Cancelling ends the work within one batch, and so does the deadline, in seconds from now.
        Raises ContextLengthExceeded, TimedOut.
        """
        del inputs, priority, deadline_s
        raise UnsupportedCapability(
            f"The model {self.info.name} ({self.info.format}) cannot rerank; use one with the "
            "capability rerank in /v1/models.",
            param="model",
        )

    @abstractmethod
    def load(self) -> EngineLoad:
        """Return the current load; never blocks."""

    @abstractmethod
    async def close(self) -> None:
        """End all requests with EngineFailed and free the memory; idempotent."""


class Backend(ABC):
    """Opens the models of one format; stateless.

    `starts_on_demand`: the format's process runs only while it is needed.  `process_bytes` is the
    measured memory of a process with the runtime, without models.  `compile_s`: seconds that a load
    may take longer than of other formats, because the runtime compiles a model the first time.
    """

    name: ClassVar[str]
    starts_on_demand: ClassVar[bool] = False
    process_bytes: ClassVar[int] = 256 * MIB
    compile_s: ClassVar[float] = 0.0

    @abstractmethod
    def availability(self) -> Availability:
        """Return whether the runtime can run here; imports no heavy packages."""

    @abstractmethod
    def identify(self, path: Path) -> ModelInfo:
        """Read a model's metadata without loading it or calling native code.

        Raises NotThisFormat, or BrokenModel if the files are of this format but damaged.
        """

    @abstractmethod
    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return the memory that `open` would use, with the context reduced to fit the limit.

        Raises InsufficientMemory with the numbers if no useful context fits.
        """

    @abstractmethod
    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; blocks.  Raises BrokenModel, InsufficientMemory, BackendUnavailable."""
