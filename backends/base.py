"""The interface that every model format implements."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from backends.prefixes.store import SnapshotPlace
from core.errors import UnsupportedCapability
from core.types import (
    Capability,
    Embeddings,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Priority,
)
from core.units import MIB


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on this machine; `reason` says why not."""

    is_available: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a backend learned from a model's files without loading them.

    `files` are absolute, the one to open first; `context_length` is the trained one in tokens.
    `details` is the backend's own, JSON-able.
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
    details: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open a model.

    `context_tokens` None means the trained length; `kv_tokens` and `kv_type` None let the backend
    choose the KV cells all sequences share.  `memory_limit_bytes` bounds what `estimate` grants.
    `prefix_bytes` of RAM keep prefixes outside the cells; `warm_tokens` stay in them meanwhile;
    `snapshots` outlive the engine.  For `stable_prompts` see `backends.prompt.normalize`.
    `tool_parser` names the family of tool calls, where the chat template does not tell.
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
    snapshots: SnapshotPlace | None = field(default=None, compare=False)
    stable_prompts: bool = True

    def granted(self, estimate: "MemoryEstimate") -> "EngineOptions":
        """Return these options with the context and cache that `estimate` found room for."""
        return replace(
            self,
            context_tokens=estimate.context_tokens,
            kv_tokens=estimate.kv_tokens,
            prefix_bytes=estimate.prefix_bytes,
            warm_tokens=estimate.warm_tokens,
        )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes a model will hold once open, with the context that fits them.

    `prefix_bytes` and `warm_tokens` are what `EngineOptions` calls so.
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
        """Everything together."""
        return self.weights_bytes + self.kv_bytes + self.transient_bytes + self.prefix_bytes


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is doing now; all counts are of this moment."""

    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    kv_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    native_cpu_s: float = 0.0


class EventSink(Protocol):
    """Where an engine puts events: called from the engine's thread, once per step; never blocks."""

    def deliver(self, batch: Seq[tuple[str, Seq[GenerationEvent]]]) -> None:
        """Take the step's events as (request id, events) pairs."""
        ...


class Engine(ABC):
    """One resident model.  Opened on a loader thread, then used from one event loop."""

    info: ModelInfo
    context_tokens: int
    max_sequences: int

    @property
    def is_failed(self) -> bool:
        """Whether the engine is of no more use and must be opened again."""
        return False

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield events; the last is always `Finished`.

        Closing the generator aborts the sequence and frees its KV cache within one step.  Raises
        before the first event ContextLengthExceeded, RequestError, QueueFull, BrokenModel; after
        it EngineFailed only.
        """

    async def stream_to(self, request: GenerationRequest, sink: EventSink) -> Finished:
        """Run `request`, its events going to `sink`; return the last one.

        Cancelling the task aborts the sequence.  Raises as `generate` does.
        """
        events = self.generate(request)
        try:
            async for event in events:
                sink.deliver([(request.id, [event])])
                if isinstance(event, Finished):
                    return event
        finally:
            await events.aclose()
        raise asyncio.CancelledError

    async def embed(
        self, inputs: Seq[str | Seq[int]], priority: Priority = "interactive"
    ) -> Embeddings:
        """Return a vector per text or token ids, in order.  Raises ContextLengthExceeded."""
        del inputs, priority
        what = f"The model {self.info.name} ({self.info.format}) cannot embed."
        raise UnsupportedCapability(what, param="model")

    @abstractmethod
    def load(self) -> EngineLoad:
        """Return the counts of this moment; never blocks."""

    @abstractmethod
    async def close(self) -> None:
        """End all requests with EngineFailed and give the memory back; twice is fine."""


class Backend(ABC):
    """How one format's models are opened; stateless.  `starts_on_demand`: no idle process.

    `process_bytes` is what a process with its runtime holds besides its models, by measurement.
    """

    name: ClassVar[str]
    starts_on_demand: ClassVar[bool] = False
    process_bytes: ClassVar[int] = 256 * MIB

    @abstractmethod
    def availability(self) -> Availability:
        """Say whether the runtime can run here; imports nothing heavy."""

    @abstractmethod
    def identify(self, path: Path) -> ModelInfo:
        """Read a model's metadata; loads nothing and calls no native code.

        Raises NotThisFormat, or BrokenModel when the files are of this format but damaged.
        """

    @abstractmethod
    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return the bytes `open` would hold, with the context lowered to fit the limit.

        Raises InsufficientMemory with the numbers when nothing useful fits.
        """

    @abstractmethod
    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load; blocks.  Raises BrokenModel, InsufficientMemory, BackendUnavailable."""
