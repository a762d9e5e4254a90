"""The interface of token-level runtimes: prompt tokens in, sampled tokens out, step by step."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from backends.base import EngineLoad, OnLogits
from backends.grammar.constraint import Constraint, RestartableMask, TokenMask
from backends.prefixes.reuse import Reuse
from core.errors import ImpetusError
from core.types import (
    SamplingParams,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to run.

    The last `generated` tokens of `prompt` belong to the answer (a resumed request);
    `max_tokens` may still be generated and fit the context.  Without `reads_cache` nothing that was
    computed for others, or before a preemption, is reused.  `on_logits` gets the logits after each
    of the prompt's tokens but the last one, in order, if the sampling asks for `prompt_logprobs`;
    it is called on the engine's thread and must not raise.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    mask: TokenMask | None = None
    generated: int = 0
    reads_cache: bool = True
    on_logits: OnLogits | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one sequence: a new token, progress on its prompt, or its failure.

    `token_id` None means prefill only.  `prefilled` prompt tokens are computed so far, `cached`
    of them were reused.  `is_end` marks an end-of-generation token, which is not text.  With
    `problem` the sequence alone has failed and is removed; the rest of the output has no meaning.
    `prompt_logprobs` are those of the next prompt tokens, each given once, if the sampling asks.
    """

    sequence_id: int
    token_id: int | None
    is_end: bool = False
    logprob: TokenLogprob | None = None
    prefilled: int = 0
    cached: int = 0
    reuse: Reuse | None = None
    problem: ImpetusError | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Stepper(Protocol):
    """Synchronous core of a token engine; called only from the engine's own thread."""

    max_sequences: int

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; it runs from the next step on.

        Raises RequestError, or anything: then the sequence is not accepted.
        """
        ...

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; its KV cache is kept for reuse where possible.  Idempotent."""
        ...

    def step(self) -> list[StepOutput]:
        """Do one forward pass: at most one token for each running sequence.

        What fails for one sequence alone is that output's `problem`.  Raises only if the pass
        failed as a whole; then the stepper is not usable any more.
        """
        ...

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts (cells, steps, preemptions, native time)."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...


class Tokenizer(Protocol):
    """A model's vocabulary.  Thread-safe."""

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; empty for control tokens."""
        ...

    @property
    def can_constrain(self) -> bool:
        """Whether `mask` is supported."""
        ...

    def mask(self, constraint: Constraint) -> RestartableMask:
        """Compile a grammar for this vocabulary.  Raises RequestError, UnsupportedParameter."""
        ...

    def read_vocabulary(self) -> None:
        """Read now what grammars and long texts need, so that none of them delays others.

        Blocks for up to a second; called once, on any thread.
        """
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        ...


@runtime_checkable
class BoundsTokens(Protocol):
    """A tokenizer that tells early that a text is too long.  Thread-safe."""

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; stops as soon as it exceeds `limit`.

        Blocks for as long as about `limit` tokens take.  Raises RequestError.
        """
        ...


@runtime_checkable
class ShowsTokens(Protocol):
    """A tokenizer that can also show control tokens.  Thread-safe."""

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """Return a token's bytes; with `special` a control token's name."""
        ...


@runtime_checkable
class KnowsEnds(Protocol):
    """A tokenizer that knows the tokens with which its model ends an answer.  Thread-safe."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Their ids, all below `vocabulary_size`; the first call takes up to 100 ms."""
        ...


@runtime_checkable
class HasChores(Protocol):
    """A stepper with background work for idle time; called on the engine's thread."""

    @property
    def has_chores(self) -> bool:
        """Whether there is background work to do."""
        ...

    def do_chore(self) -> None:
        """Do one piece of it; takes a few milliseconds at most."""
        ...


@runtime_checkable
class HasLimitations(Protocol):
    """A stepper that tells what it does otherwise than usual; see `Engine.limitations`."""

    limitations: tuple[str, ...]


def has_chores(stepper: Stepper) -> bool:
    """Return whether the stepper has background work to do now."""
    return isinstance(stepper, HasChores) and stepper.has_chores


def do_chore(stepper: Stepper) -> None:
    """Do one piece of background work, if there is any."""
    if isinstance(stepper, HasChores) and stepper.has_chores:
        stepper.do_chore()
