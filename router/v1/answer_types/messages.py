"""Types of the answers of Anthropic's API: messages, the events of a stream, and models."""

from typing import Any, Literal, TypeAlias

from typing_extensions import TypedDict

from router.v1.answer_types.common import exact

StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "compaction"]


@exact
class TextBlock(TypedDict):
    """A text."""

    type: Literal["text"]
    text: str
    citations: None


@exact
class ThinkingBlock(TypedDict):
    """The model's reasoning; hidden reasoning is encoded in `signature`."""

    type: Literal["thinking"]
    thinking: str
    signature: str


@exact
class DirectCaller(TypedDict):
    """The model itself made the call."""

    type: Literal["direct"]


@exact
class ToolUseBlock(TypedDict):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller


@exact
class CompactionBlock(TypedDict):
    """The summary of a conversation; null before its text."""

    type: Literal["compaction"]
    content: str | None
    encrypted_content: None


Block: TypeAlias = TextBlock | ThinkingBlock | ToolUseBlock | CompactionBlock


@exact
class ThinkingTokens(TypedDict):
    """How many tokens of the answer are reasoning."""

    thinking_tokens: int


@exact
class FinalUsage(TypedDict):
    """The tokens of an answer; `input_tokens` excludes the cached ones."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    server_tool_use: None


@exact
class MessageUsage(TypedDict):
    """The tokens of an answer; what Anthropic's service knows beyond is null."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    server_tool_use: None
    cache_creation: None
    inference_geo: None
    service_tier: None


@exact
class MessageAnswer(TypedDict):
    """A whole answer, or its beginning without content and stop reason."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessageUsage


@exact
class TokenCount(TypedDict):
    """The length of a prompt."""

    input_tokens: int


@exact
class MessageStart(TypedDict):
    """The first event, with the message so far."""

    type: Literal["message_start"]
    message: MessageAnswer


@exact
class BlockStart(TypedDict):
    """A block begins; it is empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: Block


@exact
class MessageTextDelta(TypedDict):
    """More text."""

    type: Literal["text_delta"]
    text: str


@exact
class InputJsonDelta(TypedDict):
    """More of a call's arguments, as JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


@exact
class ThinkingDelta(TypedDict):
    """More reasoning."""

    type: Literal["thinking_delta"]
    thinking: str


@exact
class SignatureDelta(TypedDict):
    """The signature at the end of reasoning."""

    type: Literal["signature_delta"]
    signature: str


@exact
class CompactionDelta(TypedDict):
    """The whole summary."""

    type: Literal["compaction_delta"]
    content: str | None
    encrypted_content: None


@exact
class BlockDelta(TypedDict):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: MessageTextDelta | InputJsonDelta | ThinkingDelta | SignatureDelta | CompactionDelta


@exact
class BlockStop(TypedDict):
    """A block is complete."""

    type: Literal["content_block_stop"]
    index: int


@exact
class MessageEnding(TypedDict):
    """How the answer ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    container: None


@exact
class MessageDelta(TypedDict):
    """The end of the message, with its usage."""

    type: Literal["message_delta"]
    delta: MessageEnding
    usage: FinalUsage


@exact
class MessageStop(TypedDict):
    """The last event."""

    type: Literal["message_stop"]


@exact
class Ping(TypedDict):
    """Keeps the connection open before the first token."""

    type: Literal["ping"]


MessageEvent: TypeAlias = (
    MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping
)


@exact
class Supported(TypedDict):
    """Whether a model can do something."""

    supported: bool


@exact
class ContextManagement(TypedDict):
    """What of a long conversation can be removed."""

    supported: bool
    clear_thinking_20251015: Supported
    clear_tool_uses_20250919: Supported
    compact_20260112: Supported


@exact
class EffortLevels(TypedDict):
    """Which efforts a model knows."""

    supported: bool
    low: Supported
    medium: Supported
    high: Supported
    xhigh: Supported
    max: Supported


@exact
class ServerTools(TypedDict):
    """Which tools the server itself offers."""

    supported: bool
    code_execution: Supported
    web_search: Supported


@exact
class ThinkingTypes(TypedDict):
    """Which kinds of reasoning a model knows."""

    adaptive: Supported
    between_tools: Supported
    disabled: Supported
    enabled: Supported


@exact
class ThinkingSupport(TypedDict):
    """Whether and how a model reasons."""

    supported: bool
    types: ThinkingTypes


@exact
class ModelCapabilities(TypedDict):
    """What a model can do, in the words of Anthropic's API."""

    batch: Supported
    citations: Supported
    code_execution: Supported
    context_management: ContextManagement
    effort: EffortLevels
    image_input: Supported
    pdf_input: Supported
    server_tools: ServerTools
    structured_outputs: Supported
    thinking: ThinkingSupport


@exact
class ModelInfo(TypedDict):
    """A model as Anthropic's clients read it."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    line: None
    deprecated_at: None
    retires_at: None
    max_input_tokens: int
    max_tokens: int
    capabilities: ModelCapabilities


@exact
class ModelInfoPage(TypedDict):
    """Models that chat, for clients that send `anthropic-version`."""

    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None
