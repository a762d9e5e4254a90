"""Types of the answers of `POST /v1/chat/completions`."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from router.v1.answer_types.common import (
    CompletionUsage,
    LlamaTimings,
    PhaseTimes,
    PromptTokenLogprob,
    TokenLogprob,
    exact,
)

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


@exact
class FunctionCall(TypedDict):
    """The call of a function; `arguments` are JSON text."""

    name: str
    arguments: str


@exact
class CustomCall(TypedDict):
    """The call of a custom tool, whose input is text."""

    name: str
    input: str


@exact
class FunctionToolCall(TypedDict):
    """A call of a function with its id."""

    id: str
    type: Literal["function"]
    function: FunctionCall


@exact
class CustomToolCall(TypedDict):
    """A call of a custom tool with its id."""

    id: str
    type: Literal["custom"]
    custom: CustomCall


@exact
class ChatLogprobs(TypedDict):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


@exact
class ChatAnswerMessage(TypedDict):
    """The model's message; `function_call` is sent to requests with `functions`."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[FunctionToolCall | CustomToolCall]]
    function_call: NotRequired[FunctionCall]


@exact
class ChatChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


@exact
class ChatAnswer(TypedDict):
    """A whole answer; `prompt_logprobs` and `timings` are sent if the request asks for them."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_logprobs: NotRequired[list[dict[str, PromptTokenLogprob] | None]]
    timings: NotRequired[LlamaTimings]


@exact
class FunctionCallDelta(TypedDict):
    """A piece of a call; its name comes with the first one."""

    name: NotRequired[str]
    arguments: str


@exact
class CustomCallDelta(TypedDict):
    """A piece of the call of a custom tool; its name comes with the first one."""

    name: NotRequired[str]
    input: str


@exact
class ToolCallDelta(TypedDict):
    """A piece of the call with this index; id and type come with the first one."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function", "custom"]]
    function: NotRequired[FunctionCallDelta]
    custom: NotRequired[CustomCallDelta]


@exact
class ChatDelta(TypedDict):
    """What a chunk adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    refusal: NotRequired[None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]
    function_call: NotRequired[FunctionCallDelta]


@exact
class ChatChunkChoice(TypedDict):
    """What a chunk adds to a choice; `finish_reason` is null before its end."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


@exact
class ChatChunk(TypedDict):
    """The data of an event of a streamed answer, which ends with `[DONE]`.

    With `stream_options.include_usage` the last chunk has no choices, but usage and timing.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage | None]
    timing: NotRequired[PhaseTimes]
    timings: NotRequired[LlamaTimings]
