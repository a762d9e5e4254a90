"""The body of `POST /v1/chat/completions`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from core.errors import RequestError, UnsupportedParameter
from router.requests.custom_input import CustomFormat
from router.requests.fields import (
    OPENAI_HINTS,
    Effort,
    Items,
    JsonObject,
    RequestPart,
    TokenLimit,
    WholeNumber,
    unknown_fields,
)
from router.requests.limits import (
    MAX_DOCUMENTS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
)
from router.requests.output_format import OutputFields
from router.requests.reasoning import Reasoning, ReasoningTokens
from router.requests.template_variables import TemplateVariables
from router.requests.tools import (
    AllowedTools,
    ToolChoice,
    parse_function_call,
    parse_tool_choice,
)


class FunctionCall(RequestPart):
    """The function of a tool call; `arguments` is JSON text, but a history may hold anything."""

    name: str
    arguments: Any = None


class CustomCall(RequestPart):
    """The custom tool of a call; `input` is plain text."""

    name: str
    input: str = ""


class MessageToolCall(RequestPart):
    """A tool call that an earlier answer made, by this model or another one."""

    id: str | None = None
    type: str = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class ContentPart(RequestPart):
    """A piece of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(RequestPart):
    """A chat message of any role."""

    # The result of a `function_call` has the older role `function`.
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[Items[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[Items[MessageToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    audio: Any = None


class Function(RequestPart):
    """A function the model may call; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Grammar(RequestPart):
    """What the text of a custom tool must match."""

    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomToolFormat(RequestPart):
    """The form of a custom tool's text: any, or what a grammar describes."""

    type: Literal["text", "grammar"]
    grammar: Grammar | None = None

    @property
    def flat(self) -> CustomFormat:
        """The same as the Responses API writes it."""
        given = self.grammar or Grammar()
        return CustomFormat(type=self.type, syntax=given.syntax, definition=given.definition)


class CustomTool(RequestPart):
    """A tool that takes plain text."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    format: CustomToolFormat | None = None


class ToolDefinition(RequestPart):
    """A tool the model may call."""

    type: str = "function"
    function: Function | None = None
    custom: CustomTool | None = None


class ChatRequest(OutputFields):
    """Body of `POST /v1/chat/completions`."""

    unsupported: ClassVar = {
        "chat_template": (),
        "modalities": (["text"],),
        "moderation": (),
    }
    harmless: ClassVar = OPENAI_HINTS

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenLimit = None
    max_completion_tokens: TokenLimit = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WholeNumber] | None = None
    documents: Annotated[list[JsonObject | str], Field(max_length=MAX_DOCUMENTS)] | None = None
    tools: Annotated[Items[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[ToolChoice | AllowedTools | None, PlainValidator(parse_tool_choice)] = (
        None
    )
    parallel_tool_calls: bool | None = None
    # The older form of tools and their choice.
    functions: Annotated[Items[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Annotated[ToolChoice | None, PlainValidator(parse_function_call)] = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    thinking_budget: ReasoningTokens | None = None
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)

    def refuse_unsupported(self) -> None:
        """Also refuse fields that contradict each other."""
        super().refuse_unsupported()
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                "max_tokens: differs from max_completion_tokens; send one", param="max_tokens"
            )
        if self.functions and self.tools:
            raise RequestError(
                "functions: cannot be combined with tools; send tools", param="functions"
            )
        self._check_continuation()
        if self.top_logprobs and not self.logprobs:
            raise RequestError(
                "top_logprobs: only allowed with logprobs: true", param="top_logprobs"
            )

    def _check_continuation(self) -> None:
        """Refuse a continuation of nothing, and an answer that neither begins nor continues."""
        name = "continue_final_message"
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                raise UnsupportedParameter(
                    f"add_generation_prompt: false is only supported with {name}: true",
                    param="add_generation_prompt",
                )
            return
        if self.add_generation_prompt:
            raise RequestError(
                f"add_generation_prompt: contradicts {name}; send one of them",
                param="add_generation_prompt",
            )
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant" or last.tool_calls:
            raise RequestError(
                f"{name}: the last message must have the role assistant, without tool calls",
                param=name,
            )

    def ignored_names(self) -> list[str]:
        """Also name the unknown fields of messages and `reasoning`."""
        inner = {name for message in self.messages for name in unknown_fields(message, "messages")}
        if self.reasoning is not None:
            inner |= unknown_fields(self.reasoning, "reasoning")
        return [*super().ignored_names(), *sorted(inner)]

    @property
    def custom_names(self) -> frozenset[str]:
        """The names of the tools that take plain text."""
        return frozenset(tool.custom.name for tool in self.tools or () if tool.custom is not None)

    @property
    def efforts(self) -> dict[str, str | None]:
        """The fields that name an effort, by their names."""
        effort = self.reasoning.effort if self.reasoning is not None else None
        return {"reasoning_effort": self.reasoning_effort, "reasoning.effort": effort}

    @property
    def token_limit(self) -> int | None:
        """The maximum of generated tokens, None without a limit."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives each token's logprobs list, None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
