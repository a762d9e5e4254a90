"""The nouns that requests, engines and the router share.

All are frozen dataclasses: they cross Ray's process borders by pickle and are never changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


class Capability(StrEnum):
    """What a model can be asked for."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    TOOLS = "tools"
    REASONING = "reasoning"
    INFILL = "infill"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, as an assistant message holds it; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; `content` is plain text, content parts are joined before."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages and tools, to be rendered by the model's own chat template.

    `tool_choice` may be the one function to call.  `parallel_tool_calls`: None where the client
    does not say; free answers may then hold several calls, forced ones one.  `template_kwargs` are
    further variables of the template; `reasoning_tokens` bounds the reasoning.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["none", "auto", "required"] | tuple[Literal["function"], str] = "auto"
    parallel_tool_calls: bool | None = None
    template_kwargs: Mapping[str, JsonValue] = field(default_factory=dict)
    reasoning_effort: str | None = None
    reasoning_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to be continued, with no template around it."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids of the model's own vocabulary to be continued."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InfillPrompt:
    """Text with a gap, to be filled by a model that has tokens for this."""

    prefix: str
    suffix: str


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt | InfillPrompt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; None means the model's own or the server's default.

    `repetition_penalty` 1.0 is off and counts the prompt; presence and frequency penalties
    count generated tokens only.  `top_logprobs` None: no logprobs; n: the chosen token's and
    the n likeliest.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class JsonOutput:
    """The answer must be JSON; `schema` None means any JSON object."""

    schema: Mapping[str, JsonValue] | None = None


# Every queue orders a batch request as if it had come that many seconds later.
Priority: TypeAlias = Literal["interactive", "batch"]
BATCH_DELAY_S = 30.0


@dataclass(frozen=True, slots=True)
class RegexOutput:
    """The answer must match `pattern` as a whole; `param` is the field that asked for it."""

    pattern: str
    param: str


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """The answer must be one of `choices`; `param` is the field that asked for it."""

    choices: tuple[str, ...]
    param: str


Output: TypeAlias = JsonOutput | RegexOutput | ChoiceOutput


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate; `max_tokens` None means up to the context's end.

    `deadline_s` counts from the engine's receipt; the request ends with `EngineFailed` then.
    `generated` are the tokens of the answer whose events another engine has sent already, up to
    one of those events: this engine goes on after them, sends nothing twice, and counts them in
    `max_tokens` and the usage.
    """

    id: str
    model_id: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    output: Output | None = None
    echo_prompt: bool = False
    deadline_s: float | None = None
    generated: tuple[int, ...] = ()
    priority: Priority = "interactive"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability; `data` is its bytes, perhaps part of a character."""

    token_id: int
    data: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact token counts; `cached_tokens` are prompt tokens that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


MissReason: TypeAlias = Literal["no_snapshot", "other_model_version", "evicted", "diverged"]


@dataclass(frozen=True, slots=True)
class CacheOutcome:
    """Where a prompt's cached tokens came from, and why the token after them was computed.

    `cells_tokens` were in the engine's own cache, the others in RAM or on disk.  `miss` None:
    nothing was missing.  `diverged_at` is the first token that differs from the nearest known
    prompt, `before_text` what both have before it, then the text of either.
    """

    cells_tokens: int = 0
    ram_tokens: int = 0
    disk_tokens: int = 0
    miss: MissReason | None = None
    diverged_at: int | None = None
    before_text: str = ""
    known_text: str = ""
    asked_text: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a request: waiting for memory or a slot, loading the model, prompt, answer.

    `throttled_s` are those of them that heat, low power or memory pressure cost.  `evicted` names
    the models that were unloaded for it; `resumed` counts the engines that were lost meanwhile.
    """

    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    load_s: float = 0.0
    throttled_s: float = 0.0
    evicted: tuple[str, ...] = ()
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How much of the prompt is computed."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of the answer, with the ids of the tokens it came from."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """New text of the model's reasoning, kept apart from the answer."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call: `id` and `name` come once, `arguments` is JSON text to append."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    token_ids: tuple[int, ...] = ()


MismatchKind: TypeAlias = Literal["schema", "malformed", "undeclared"]

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every generation that did not raise; `stop` is the stop string met.

    `mismatches` says what was wrong with tool calls that were passed on as they are: arguments
    that do not fit the tool's schema, a call that broke off, a function nobody declared.
    """

    reason: FinishReason
    usage: Usage
    timing: Timing = field(default_factory=Timing)
    stop: str | None = None
    mismatches: tuple[MismatchKind, ...] = ()
    cache: CacheOutcome | None = None


GenerationEvent: TypeAlias = PrefillProgress | TextDelta | ReasoningDelta | ToolCallDelta | Finished


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """Vectors in the order of the inputs: float32, shape (len(inputs), dimension)."""

    vectors: NDArray[np.float32]
    prompt_tokens: int
