"""Optional abilities of backends and engines: token counting, KV types, preloading a runtime."""

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Protocol, runtime_checkable

from backends.base import Backend, Engine, EngineOptions, EventReceiver, ModelInfo, OnLogits
from backends.limits import deadline
from core.errors import UnsupportedCapability, UnsupportedParameter
from core.types import (
    Capability,
    Finished,
    GenerationRequest,
    Prompt,
    TokenizedPrompt,
    TokenizeOptions,
)

# The names that any format supports; requests with other names are rejected.
KV_TYPES = ("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@runtime_checkable
class TokenCounting(Protocol):
    """An engine that can count a prompt's tokens without running it."""

    async def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of prompt tokens, including those of chat template and tools.

        Raises as `Engine.generate` does for a prompt, except for its length.
        """
        ...

    async def tokenize(self, prompt: Prompt, options: TokenizeOptions) -> TokenizedPrompt:
        """Return the prompt's text and tokens.  Raises as `count_tokens` does."""
        ...


async def count_tokens(engine: Engine, prompt: Prompt, deadline_s: float | None = None) -> int:
    """Return the number of prompt tokens.

    Raises UnsupportedCapability if not supported, TimedOut after `deadline_s` seconds.
    """
    counting = _counting(engine)
    async with deadline(deadline_s, "messages"):
        return await counting.count_tokens(prompt)


async def tokenize(
    engine: Engine, prompt: Prompt, options: TokenizeOptions, deadline_s: float | None = None
) -> TokenizedPrompt:
    """Return the prompt's text and tokens.  Raises as `count_tokens` does."""
    counting = _counting(engine)
    async with deadline(deadline_s, "prompt"):
        return await counting.tokenize(prompt, options)


def _counting(engine: Engine) -> TokenCounting:
    if isinstance(engine, TokenCounting):
        return engine
    raise UnsupportedCapability(
        f"The model {engine.info.name} ({engine.info.format}) cannot count tokens; use a "
        "model of another format.",
        param="model",
    )


@runtime_checkable
class GivesLogits(Protocol):
    """An engine that shows the logits by which it predicts each token of a prompt."""

    async def read_logits(
        self, request: GenerationRequest, receiver: EventReceiver, on_logits: OnLogits
    ) -> Finished:
        """Run `request`, whose sampling must have `prompt_logprobs`; see `Engine.stream_to`.

        `on_logits` is called on the engine's thread and must not raise.  Raises as `generate`
        does, and NonFiniteOutput.
        """
        ...


@runtime_checkable
class Measured(Protocol):
    """A backend whose memory is measured; `reserves_kv`: all KV cells are allocated at open."""

    reserves_kv: ClassVar[bool]

    def preload(self, info: ModelInfo, options: EngineOptions) -> None:
        """Import the runtime that `info` needs, so its memory is not attributed to a model.

        Blocks; call it on a loader thread.
        """
        ...


@runtime_checkable
class KvTyped(Protocol):
    """A backend that supports several KV cache types."""

    def kv_types(self, info: ModelInfo) -> Mapping[str, float]:
        """Return the KV cache types that this model supports, with their bytes per element."""
        ...


@runtime_checkable
class RuntimeChecked(Protocol):
    """A backend that can find out by a model's files whether a runtime really loads it."""

    def start_checks(self, avoid: Collection[str], on_runtime: Callable[[str], None]) -> None:
        """Start what a limited process cannot start later, such as threads.

        `avoid` and `on_runtime` are those of `check_runtimes`.
        """
        ...

    def check_runtimes(
        self, info: ModelInfo, avoid: Collection[str], on_runtime: Callable[[str], None]
    ) -> ModelInfo:
        """Return `info` with what runs it, as `choice`, and the parameters that are computed with.

        Imports runtimes and runs their code on the model's configuration, which may end or block
        the process: call it in a limited child.  `on_runtime` is called with the name of each
        runtime before its code is used; those in `avoid` are not.  Raises BrokenModel if none can
        load the model, MemoryError.
        """
        ...


def check_runtime(info: ModelInfo, runtime: str) -> None:
    """Raise UnsupportedParameter if `runtime` cannot run the model; says why not."""
    choice = info.choice
    if choice is None:
        raise UnsupportedParameter(
            f"Models of the format {info.format} have one runtime; leave runtime out.",
            param="runtime",
        )
    if runtime not in (choice.runtime, choice.alternative):
        raise UnsupportedParameter(
            f"{info.name} cannot run on {runtime}: {choice.alternative_reason or 'unknown'}. It "
            f"runs on {choice.runtime}; leave runtime out.",
            param="runtime",
        )


def check_deterministic(info: ModelInfo) -> None:
    """Raise UnsupportedParameter for a model whose answers are not computed by Impetus's engines.

    Apple's model ignores a seed, and other models may be embedders or rerankers.
    """
    if info.format == "apple-foundation":
        raise UnsupportedParameter(
            f"{info.name} is run by macOS, which may answer the same request otherwise; leave "
            "deterministic out, or use a model of another format.",
            param="deterministic",
        )
    if not info.capabilities & {Capability.CHAT, Capability.COMPLETION}:
        raise UnsupportedParameter(
            f"{info.name} generates no text; leave deterministic out.", param="deterministic"
        )


def check_kv_type(backend: Backend | None, info: ModelInfo, kv_type: str) -> None:
    """Raise UnsupportedParameter if the model does not support the KV cache type `kv_type`."""
    known: Mapping[str, float] = {}
    if isinstance(backend, KvTyped):
        known = backend.kv_types(info)
    if kv_type in known:
        return
    hint = f"use one of {', '.join(known)}" if known else "leave kv_type out"
    raise UnsupportedParameter(
        f"{info.name} ({info.format}) does not support the kv_type {kv_type}; {hint}.",
        param="kv_type",
    )
