"""Types of the answers of OpenAI's Responses API."""

from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict

from router.v1.answer_types.common import TokenLogprob, exact

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


@exact
class OutputText(TypedDict):
    """A text; log-probabilities are sent if the request includes them."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


@exact
class ReasoningText(TypedDict):
    """Reasoning."""

    type: Literal["reasoning_text"]
    text: str


@exact
class MessageItem(TypedDict):
    """A message of the model."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


@exact
class ReasoningItem(TypedDict):
    """The model's reasoning; `encrypted_content` is sent if the request includes it."""

    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: NotRequired[str]


@exact
class FunctionCallItem(TypedDict):
    """The call of a function; `namespace` is that of its tool, if it has one."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    arguments: str


@exact
class CustomToolCallItem(TypedDict):
    """The call of a custom tool, whose input is text."""

    type: Literal["custom_tool_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    input: str


OutputItem: TypeAlias = MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem


@exact
class InputTokensDetails(TypedDict):
    """How many tokens of the prompt were computed before."""

    cached_tokens: int
    cache_write_tokens: int


@exact
class OutputTokensDetails(TypedDict):
    """How many tokens of the answer are reasoning."""

    reasoning_tokens: int


@exact
class ResponseUsage(TypedDict):
    """The tokens of an answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


@exact
class ResponseError(TypedDict):
    """Why an answer failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


@exact
class IncompleteDetails(TypedDict):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


@exact
class UsedReasoning(TypedDict):
    """How the request wanted the model to reason."""

    effort: str | None
    summary: None


@exact
class TextSettings(TypedDict):
    """The form of the text that the request asked for."""

    format: dict[str, Any]


@exact
class ResponseAnswer(TypedDict):
    """An answer in any status; fields that are not told here are those of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: UsedReasoning
    store: bool
    temperature: float | None
    text: TextSettings
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


@exact
class InputTokens(TypedDict):
    """The length of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


@exact
class DeletedResponse(TypedDict):
    """A stored answer that was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


@exact
class InputItemPage(TypedDict):
    """The items before a stored answer, as they were sent."""

    data: list[dict[str, Any]]
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


@exact
class ResponseStep(TypedDict):
    """The answer as it begins, or as it ended."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseAnswer
    sequence_number: int


@exact
class ItemStep(TypedDict):
    """An item begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem
    sequence_number: int


@exact
class ContentStep(TypedDict):
    """The content of an item begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText
    sequence_number: int


@exact
class EventAlternative(TypedDict):
    """A token that could have come."""

    token: str
    logprob: float


@exact
class EventLogprob(TypedDict):
    """A token of a text, with the likeliest ones at its place."""

    token: str
    logprob: float
    top_logprobs: list[EventAlternative]


@exact
class OutputTextDelta(TypedDict):
    """More text."""

    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[EventLogprob]
    sequence_number: int


@exact
class OutputTextDone(TypedDict):
    """The whole text."""

    type: Literal["response.output_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[EventLogprob]
    sequence_number: int


@exact
class ReasoningTextDelta(TypedDict):
    """More reasoning."""

    type: Literal["response.reasoning_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    sequence_number: int


@exact
class ReasoningTextDone(TypedDict):
    """The whole reasoning."""

    type: Literal["response.reasoning_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    sequence_number: int


@exact
class CallDelta(TypedDict):
    """More of a call's arguments or input."""

    type: Literal["response.function_call_arguments.delta", "response.custom_tool_call_input.delta"]
    item_id: str
    output_index: int
    delta: str
    sequence_number: int


@exact
class FunctionCallDone(TypedDict):
    """The whole arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str
    sequence_number: int


@exact
class CustomCallDone(TypedDict):
    """The whole input of a call."""

    type: Literal["response.custom_tool_call_input.done"]
    item_id: str
    output_index: int
    input: str
    sequence_number: int


@exact
class ResponseErrorEvent(TypedDict):
    """Why the answer failed, with the code of the error envelope."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None
    sequence_number: int


ResponseEvent: TypeAlias = (
    ResponseStep
    | ItemStep
    | ContentStep
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | CallDelta
    | FunctionCallDone
    | CustomCallDone
    | ResponseErrorEvent
)
