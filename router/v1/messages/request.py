"""Request bodies of Anthropic's Messages API.

Source: Anthropic's API reference, and the types of its Python SDK.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, model_validator

from core.errors import RequestError
from core.types import JsonOutput, SamplingParams
from router.requests.fields import (
    Effort,
    Items,
    JsonObject,
    RequestBody,
    RequestPart,
    TokenCount,
    WholeNumber,
    parse_stop,
    unknown_fields,
)
from router.requests.limits import MAX_INT32, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from router.requests.output_format import FlatFormat
from router.requests.tools import choice_mode, function_name

# Fields of blocks and tools without effect: prefixes are always reused, calls always checked.
_HARMLESS_PARTS = frozenset(
    {
        "allowed_callers",
        "cache_control",
        "caller",
        "citations",
        "eager_input_streaming",
        "input_examples",
        "strict",
        "toolset_name",
    }
)

# Block types of which `Block` has all fields that matter; others are read whole.
_KNOWN_FIELDS = frozenset({"text", "thinking", "tool_use", "tool_result"})


class Block(RequestPart):
    """A content block of any type; the required fields depend on the type."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    # Earlier calls: a model may have written anything as its arguments.
    input: Any = None
    tool_use_id: str | None = None
    content: "str | Items[Block] | Block | None" = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


Blocks = Annotated[Items[Block], Field(max_length=MAX_PARTS)]


class Message(RequestPart):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks = ""
    # How long a system message is shown.
    clear_at: Literal["next_user_message", "never"] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        """A system message may have an `output_config` alone."""
        if self.role != "system" and "content" not in self.model_fields_set:
            raise ValueError("content: required")
        return self


class Tool(RequestPart):
    """A tool the model may call; the client's own tools have a name and a schema."""

    name: str | None = Field(default=None, min_length=1, max_length=256)
    type: str | None = None
    description: str | None = None
    input_schema: JsonObject | None = None

    @property
    def is_of_anthropic(self) -> bool:
        """Whether Anthropic defines the tool, such as `web_search_20250305`."""
        return self.type not in (None, "custom")


class ToolChoice(RequestPart):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_any_api(cls, value: object) -> object:
        """Read the words and shapes of OpenAI's APIs too."""
        more = value if isinstance(value, dict) else {}
        if (mode := choice_mode(value)) is not None:
            return {**more, "type": "any" if mode == "required" else mode}
        if (name := function_name(value)) is not None:
            rest = {key: inner for key, inner in more.items() if key != "function"}
            return {**rest, "type": "tool", "name": name}
        return value


class Thinking(RequestPart):
    """Whether the model reasons, its token budget, and whether reasoning is shown."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: TokenCount | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None


class ThreadField(RequestPart):
    """Whether the server keeps the conversation, and which kept one the messages follow."""

    type: Literal["create", "continue"]
    previous_message_id: str | None = None


class Compaction(RequestPart):
    """Asks for a summary of the conversation instead of an answer."""

    type: Literal["summarize"]
    instructions: str | None = None


class OutputConfig(RequestPart):
    """Effort and format of the answer."""

    effort: Effort | None = None
    format: FlatFormat | None = None


class MessagesPromptRequest(RequestBody):
    """Body of `POST /v1/messages/count_tokens`; base of all Messages requests."""

    unsupported: ClassVar = {
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "prefill": (),
    }
    harmless: ClassVar = frozenset({"cache_control", "inference_geo", "metadata", "service_tier"})

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Blocks | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: FlatFormat | None = None
    thread: ThreadField | None = None
    # Counts are of the conversation as it is sent.
    compaction: Compaction | None = None

    @property
    def previous_message_id(self) -> str | None:
        """The answer whose kept conversation the messages follow."""
        return self.thread.previous_message_id if self.thread else None

    def refuse_unsupported(self) -> None:
        """Also refuse fields that do not fit each other."""
        super().refuse_unsupported()
        in_config = self.output_config.format if self.output_config else None
        if in_config and self.output_format and in_config != self.output_format:
            raise RequestError(
                "output_format: differs from output_config.format; send one of them",
                param="output_format",
            )
        thread = self.thread
        if thread is not None and (thread.type == "continue") == (not thread.previous_message_id):
            raise RequestError(
                "thread.previous_message_id: required with type continue and only allowed there",
                param="thread.previous_message_id",
            )
        thinking = self.thinking
        if thinking is not None and (thinking.type == "enabled") != bool(thinking.budget_tokens):
            raise RequestError(
                "thinking.budget_tokens: required with type enabled and only allowed there",
                param="thinking.budget_tokens",
            )

    def ignored_names(self) -> list[str]:
        """Also name the unknown fields of messages, blocks and tools."""
        inner = {name for message in self.messages for name in unknown_fields(message, "messages")}
        for tool in self.tools or ():
            # A tool that is left out is named by its type, bounded as every name in the header.
            inner |= (
                {f"tools.{tool.type}"} if tool.is_of_anthropic else unknown_fields(tool, "tools")
            )
        for message in self.messages:
            if not isinstance(message.content, str):
                for block in message.content:
                    if block.type in _KNOWN_FIELDS:
                        inner |= unknown_fields(block, "messages.content")
        if self.output_config is not None and self.output_config.format is not None:
            inner |= self.output_config.format.ignored_names("output_config.format")
        if self.output_format is not None:
            inner |= self.output_format.ignored_names("output_format")
        shown = (name for name in inner if name.rpartition(".")[2] not in _HARMLESS_PARTS)
        return [*super().ignored_names(), *sorted(shown)]

    @property
    def output(self) -> JsonOutput | None:
        """The constraint on the answer's text.  Raises RequestError for a schema too big."""
        in_config = self.output_config.format if self.output_config else None
        # The field's first name, under which older SDKs still send it.
        given = in_config or self.output_format
        if given is None:
            return None
        return given.output(f"output_{'config.format' if in_config else 'format'}")


class MessagesRequest(MessagesPromptRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT32), WholeNumber]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT32), WholeNumber] | None = None
    stop_sequences: Annotated[tuple[str, ...], PlainValidator(parse_stop)] = ()
    stream: bool | None = None

    def refuse_unsupported(self) -> None:
        """Also refuse a reasoning budget that exceeds the whole answer's."""
        super().refuse_unsupported()
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget is not None and budget >= self.max_tokens and not self.only_warms:
            raise RequestError(
                "thinking.budget_tokens: must be less than max_tokens",
                param="thinking.budget_tokens",
            )

    @property
    def only_warms(self) -> bool:
        """Whether the prompt is only to be computed, so that a later request can reuse it."""
        return self.max_tokens == 0

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters."""
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def hides_thinking(self) -> bool:
        """Whether reasoning is sent encoded instead of readable."""
        return self.thinking is not None and self.thinking.display == "omitted"
