"""Echo backend for tests: repeats the prompt's last message, one byte per token."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineLoad,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from backends.engine.batching import BatchingEngine
from backends.grammar.constraint import Constraint, RestartableMask
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Preparer
from backends.stepper import SequenceSpec, StepOutput
from core.errors import NotThisFormat, RequestError, UnsupportedParameter
from core.types import Capability, TokenLogprob
from core.units import MIB

END_TOKEN = 256
_CONTEXT_TOKENS = 65_536
_TEMPLATE = "{{ messages[-1].content }}"


class ByteTokenizer:
    """A tokenizer whose ids are UTF-8 bytes; 256 ends the answer."""

    vocabulary_size = END_TOKEN + 1
    can_constrain = False

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the bytes of `text`; there are no special tokens.  Raises RequestError."""
        del add_bos, parse_special
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(
                "The text is not valid Unicode: it has an unpaired surrogate.", param="prompt"
            ) from error

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return the number of tokens; see `backends.stepper.BoundsTokens`."""
        del limit
        return len(text.encode("utf-8", "surrogatepass"))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the byte itself."""
        return bytes((token_id,)) if token_id < END_TOKEN else b""

    def read_vocabulary(self) -> None:
        """Do nothing: there is none."""

    def mask(self, constraint: Constraint) -> RestartableMask:
        """Refuse grammars: the answer is fixed.  Raises UnsupportedParameter."""
        raise UnsupportedParameter(
            f"The echo model does not support {constraint.param}.", param=constraint.param
        )


class EchoStepper:
    """A stepper that repeats each prompt, one byte per step, each with probability one."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self._left: dict[int, list[int]] = {}
        self._specs: dict[int, SequenceSpec] = {}
        self._scores: dict[int, tuple[TokenLogprob, ...]] = {}
        self._steps = 0

    def add(self, spec: SequenceSpec) -> None:
        """Add a sequence.  Raises UnsupportedParameter for logit_bias."""
        if spec.sampling.logit_bias:
            raise UnsupportedParameter(
                "The echo model does not support logit_bias.", param="logit_bias"
            )
        self._specs[spec.id] = spec
        if (top := spec.sampling.prompt_logprobs) is not None:
            first, *others = spec.prompt
            unknown = replace(_certain(first, 0), logprob=math.nan)
            self._scores[spec.id] = (unknown, *(_certain(token_id, top) for token_id in others))
        asked = spec.prompt[: len(spec.prompt) - spec.generated]
        self._left[spec.id] = [END_TOKEN, *reversed(asked[spec.generated :])]

    def remove(self, sequence_id: int) -> None:
        """Remove a sequence; idempotent."""
        self._left.pop(sequence_id, None)
        self._specs.pop(sequence_id, None)
        self._scores.pop(sequence_id, None)

    def step(self) -> list[StepOutput]:
        """Return the next byte of every sequence."""
        self._steps += 1
        return [self._next(sequence_id, left) for sequence_id, left in self._left.items() if left]

    def _next(self, sequence_id: int, left: list[int]) -> StepOutput:
        token_id, spec = left.pop(), self._specs[sequence_id]
        wanted = spec.sampling.top_logprobs
        is_end = token_id == END_TOKEN
        return StepOutput(
            sequence_id,
            token_id,
            is_end,
            None if wanted is None else _certain(token_id, wanted),
            prefilled=len(spec.prompt),
            prompt_logprobs=self._scores.pop(sequence_id, ()),
        )

    def counters(self) -> EngineLoad:
        """Return the number of steps."""
        return EngineLoad(steps=self._steps)

    def close(self) -> None:
        """Forget all sequences."""
        self._left.clear()
        self._specs.clear()
        self._scores.clear()


def _certain(token_id: int, top: int) -> TokenLogprob:
    """Return a token with probability one; the only alternative is itself."""
    data = bytes((token_id,)) if token_id < END_TOKEN else b""
    alternatives = (TokenLogprob(token_id, data, 0.0),) if top else ()
    return TokenLogprob(token_id, data, 0.0, alternatives)


class EchoBackend(Backend):
    """The backend of the echo model; for trying clients, for tests, and as an example."""

    name: ClassVar[str] = "echo"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 160 * MIB

    def availability(self) -> Availability:
        """Available everywhere."""
        return Availability(True)

    def identify(self, path: Path) -> ModelInfo:
        """Recognise no file.  Raises NotThisFormat."""
        raise NotThisFormat(f"{path.name}: the echo model has no files")

    def built_in(self) -> tuple[ModelInfo, ...]:
        """Return the model that needs no files."""
        return (echo_info(),)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return zero bytes: there are no weights."""
        context = min(options.context_tokens or info.context_length, info.context_length)
        return MemoryEstimate(0, 0, 0, context, context)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Start the engine."""
        context = self.estimate(info, options).context_tokens
        chat = ChatFormat(_TEMPLATE, "", "", tool_parser=options.tool_parser)
        preparer = Preparer(info, ByteTokenizer(), chat, context_tokens=context)
        return BatchingEngine(
            info,
            preparer,
            lambda: EchoStepper(options.max_sequences),
            max_waiting=options.max_waiting,
        )


def echo_info() -> ModelInfo:
    """Return the description of the echo model."""
    details: Mapping[str, int | float | str | bool] = {}
    return ModelInfo(
        format="echo",
        name="echo",
        architecture="echo",
        quantization="",
        files=(),
        size_bytes=0,
        parameters=0,
        context_length=_CONTEXT_TOKENS,
        capabilities=frozenset({Capability.CHAT, Capability.COMPLETION, Capability.TOOLS}),
        license="Apache-2.0",
        details=details,
    )
