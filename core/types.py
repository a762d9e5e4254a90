"""Data types shared by requests, engines and the router: prompts, sampling, events, usage.

All are frozen dataclasses: they are pickled between Ray's processes and never modified.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


class Capability(StrEnum):
    """A kind of request that a model supports."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    TOOLS = "tools"
    REASONING = "reasoning"
    INFILL = "infill"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call in an assistant message; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A chat message; `content` is plain text, with content parts already joined."""

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
    """Messages and tools, to be rendered by the model's chat template.

    `tool_choice` may name the function to call.  `parallel_tool_calls` is None if the client does
    not say: an unconstrained answer may then contain several calls, a forced one only one.
    `template_kwargs` are extra template variables; `reasoning_tokens` limits the reasoning.
    `continues_answer`: the answer continues the last message, which is the assistant's.
    `documents` are what the answer shall be based on, each with its text and other fields.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["none", "auto", "required"] | tuple[Literal["function"], str] = "auto"
    parallel_tool_calls: bool | None = None
    template_kwargs: Mapping[str, JsonValue] = field(default_factory=dict)
    reasoning_effort: str | None = None
    reasoning_tokens: int | None = None
    continues_answer: bool = False
    documents: tuple[Mapping[str, JsonValue], ...] = ()


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue, without a chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids of the model's vocabulary to continue."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InfillPrompt:
    """Text before and after a gap, for models with fill-in-the-middle tokens."""

    prefix: str
    suffix: str


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt | InfillPrompt


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """How a text is tokenized by itself; a conversation is tokenized as for its answer.

    `add_special`: with the tokens that the model expects around a text.  `parse_special`: the names
    of control tokens become these tokens.
    """

    add_special: bool = True
    parse_special: bool = True


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as its model reads it: the text, and each token's id and bytes, in order."""

    text: str
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters; None means the model's own value or the server's default.

    `repetition_penalty` 1.0 is off; it includes the prompt, whereas presence and frequency
    penalties count generated tokens only.  `top_logprobs` None: no logprobs; n: those of the
    chosen token and the n most likely ones.  `prompt_logprobs` is the same for the prompt's tokens.
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
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Which tokens end an answer, and which texts are not in it.

    With `ignore_eos` the model's end tokens do not come; before `min_tokens` tokens neither they
    nor `stop_token_ids` nor stop strings end the answer.  A token of `stop_token_ids` ends it as an
    end token does.  No text of `bad_words` is generated, however it is cut into tokens.
    """

    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JsonOutput:
    """The answer must be JSON; `schema` None means any JSON object."""

    schema: Mapping[str, JsonValue] | None = None


# Every queue orders a batch request as if it had arrived this many seconds later.
Priority: TypeAlias = Literal["interactive", "batch"]
BATCH_DELAY_S = 30.0


@dataclass(frozen=True, slots=True)
class RegexOutput:
    """The whole answer must match `pattern`; `param` is the request field that asked for it."""

    pattern: str
    param: str


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """The answer must be one of `choices`; `param` is the request field that asked for it."""

    choices: tuple[str, ...]
    param: str


@dataclass(frozen=True, slots=True)
class GrammarOutput:
    """The whole answer must match `grammar`, in GBNF or Lark; `param` is the request field."""

    grammar: str
    param: str


Output: TypeAlias = JsonOutput | RegexOutput | ChoiceOutput | GrammarOutput


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """The sequences of one request of a client, such as `n` choices: all start, or none."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate; `max_tokens` None means up to the end of the context.

    `deadline_s` counts from receipt by the engine; after it the request ends with `TimedOut`.
    `generated` are the tokens of a resumed answer whose events another engine already sent, up to
    and including one of those events: this engine continues after them, sends nothing twice, and
    counts them in `max_tokens` and the usage.  Without `reads_cache` the whole prompt is computed.
    `group` is None for a sequence of its own.
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
    rules: TokenRules | None = None
    reads_cache: bool = True
    group: RequestGroup | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability; `data` is its bytes, possibly part of a character.

    The first token of a prompt has the logprob NaN: nothing is before it.
    """

    token_id: int
    data: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact token counts; `cached_tokens` are prompt tokens that were reused, not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


# `damaged`: the stored block could not be read or was refused; `no_room`: the engine had no room.
MissReason: TypeAlias = Literal[
    "no_snapshot", "other_model_version", "evicted", "damaged", "no_room", "diverged"
]


@dataclass(frozen=True, slots=True)
class CacheOutcome:
    """Sources of a prompt's cached tokens, and why the token after them was computed.

    `cells_tokens` were in the engine's own cache, the others in RAM or on disk.  `miss` is None if
    nothing was missing.  `diverged_at` is the index of the first token that differs from the
    nearest known prompt; `before_text` is the common text before it, `known_text` and `asked_text`
    the texts after it.
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
    """Seconds per phase: waiting for memory or a slot, model load, prompt, answer.

    `throttled_s` is the part lost to heat, low power or memory pressure.  `evicted` names the
    models unloaded for the request; `resumed` counts the engines lost during it.
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
    """Progress of the prompt computation; the last has all tokens' `logprobs`, if asked for."""

    done_tokens: int
    total_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of the answer, with the ids of its tokens."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """New text of the model's reasoning, separate from the answer."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """Part of a tool call: `id` and `name` are sent once, `arguments` is JSON text to append."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    token_ids: tuple[int, ...] = ()


MismatchKind: TypeAlias = Literal["schema", "malformed", "undeclared"]

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every generation that did not raise; `stop` is the matched stop string.

    `mismatches` lists problems of tool calls that were sent unchanged: arguments that violate the
    tool's schema, an incomplete call, an undeclared function.
    """

    reason: FinishReason
    usage: Usage
    timing: Timing = field(default_factory=Timing)
    stop: str | None = None
    mismatches: tuple[MismatchKind, ...] = ()
    cache: CacheOutcome | None = None


GenerationEvent: TypeAlias = PrefillProgress | TextDelta | ReasoningDelta | ToolCallDelta | Finished


# Which end of an input over the model's limit is cut: "default" is as the tokenizer is configured.
Truncation: TypeAlias = Literal["none", "default", "start", "end"]


@dataclass(frozen=True, slots=True)
class EmbeddingParams:
    """How the inputs of an embedding request are prepared, and the size of its vectors.

    `truncate` "none" refuses inputs over the model's limit.  `prompt_name` is one of the model's
    prompts, `input_type` a kind of text that it may have a prompt for, such as query or document.
    `dimensions` None means the model's own.
    """

    truncate: Truncation = "default"
    prompt_name: str | None = None
    input_type: str | None = None
    dimensions: int | None = None


DEFAULT_EMBEDDING = EmbeddingParams()


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """Vectors in the order of the inputs: float32, shape (len(inputs), dimension).

    `truncated_tokens` were cut from inputs over the model's limit and are not in `prompt_tokens`.
    """

    vectors: NDArray[np.float32]
    prompt_tokens: int
    truncated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RerankInputs:
    """A query and the documents to score against it.

    A pair over the model's limit is cut if `is_truncated`, else refused.  A document is cut to
    `max_document_tokens` in any case.
    """

    query: str
    documents: tuple[str, ...]
    is_truncated: bool = True
    max_document_tokens: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Relevance:
    """Scores in the order of the documents, float32 (len(documents),); higher is more relevant."""

    scores: NDArray[np.float32]
    prompt_tokens: int
    truncated_tokens: int = 0
