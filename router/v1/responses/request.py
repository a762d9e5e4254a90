"""Request body of OpenAI's Responses API."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from core.types import JsonOutput, JsonValue
from router.requests.custom_input import CustomFormat
from router.requests.fields import (
    Effort,
    Items,
    JsonObject,
    RequestPart,
    SamplingFields,
    TokenCount,
    TokenLimit,
    WholeNumber,
    unknown_fields,
)
from router.requests.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from router.requests.output_format import FlatFormat
from router.requests.template_variables import TemplateVariables
from router.requests.tools import ChoiceMode, allowed_tools, choice_mode, function_name

MAX_METADATA = 16
READ_TYPES = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
        "item_reference",
    }
)
OFFERED_TYPES = frozenset({"function", "custom", "namespace"})
_ENCRYPTED_REASONING = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"
# Those beside the first two are about tools and parts that never occur in an answer here.
_INCLUDED = frozenset(
    {
        _ENCRYPTED_REASONING,
        _LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)


class Part(RequestPart):
    """A piece of a message, of a tool's output or of reasoning."""

    type: str
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[Items[Part], Field(max_length=MAX_PARTS)]


def _text_of_other(value: object) -> object:
    """Return what is neither text nor a list of parts, such as an object, as JSON."""
    is_parts = isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in value
    )
    if value is None or isinstance(value, str) or is_parts:
        return value
    return json.dumps(value, ensure_ascii=False)


class Item(RequestPart):
    """A conversation item of any type; the required fields depend on the type.

    An item of another type than `READ_TYPES` has no fields here but its `other_item`.
    """

    type: str | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Parts | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Annotated[str | None, BeforeValidator(_text_of_other)] = None
    input: str | None = None
    output: Annotated[str | Parts | None, BeforeValidator(_text_of_other)] = None
    summary: Parts | None = None
    encrypted_content: str | None = None
    other_item: JsonObject | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_any_type(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind in READ_TYPES:
            return value
        return {"type": kind, "other_item": value}


class Tool(RequestPart):
    """A tool the model may call; a `namespace` has `tools` of its own."""

    type: str
    name: str | None = Field(default=None, min_length=1, max_length=256)
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    format: CustomFormat | None = None
    tools: Annotated[Items["Tool"], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_details(cls, value: object) -> object:
        """Leave out the fields of tools that cannot be offered, whatever their form."""
        kind = value.get("type") if isinstance(value, dict) else None
        return {"type": kind} if isinstance(kind, str) and kind not in OFFERED_TYPES else value


class NamedTool(RequestPart):
    """A tool in `tool_choice`."""

    type: str
    name: str = ""
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """A mode, or the one tool `named`; `allowed` are the only tools that may be called.

    `sent` is what the client sent, to be returned with the answer.
    """

    mode: ChoiceMode = "auto"
    named: NamedTool | None = None
    allowed: tuple[NamedTool, ...] | None = None
    sent: Any = "auto"


class Text(RequestPart):
    """Format of the answer's text; its verbosity is a hint that no model here takes."""

    format: FlatFormat | None = None
    verbosity: str | None = None


class Reasoning(RequestPart):
    """Reasoning effort; reasoning is returned whole, never summarized."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class StreamOptions(RequestPart):
    """Stream options; padding against traffic analysis is a hint that is not followed."""

    include_obfuscation: bool | None = None


def parse_tool_choice(value: object) -> ToolChoice | None:
    """Return the choice; raises ValueError."""
    if value is None:
        return None
    if (mode := choice_mode(value)) is not None:
        return ToolChoice(mode, sent=mode)
    if (listed := allowed_tools(value)) is not None:
        allowed = tuple(_named_tool(tool) for tool in listed[1])
        shown: list[JsonValue] = [_shown_tool(tool) for tool in allowed]
        sent = {"type": "allowed_tools", "mode": listed[0], "tools": shown}
        return ToolChoice(listed[0], allowed=allowed, sent=sent)
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        named = _named_tool(value)
        if named.type in ("function", "tool", "custom") and not named.name:
            raise ValueError("needs the name of the tool")
        return ToolChoice(named=named, sent=_shown_tool(named))
    raise ValueError(
        'must be "none", "auto", "required", {"type": "function", "name": …} or '
        '{"type": "allowed_tools", "mode": …, "tools": […]}'
    )


def _named_tool(value: object) -> NamedTool:
    match value:
        case {"type": str(kind), **more}:
            name, namespace = more.get("name"), more.get("namespace")
            if (function := function_name(value)) is not None:
                kind, name = "function", function
            elif name is None and isinstance(custom := more.get("custom"), dict):
                name = custom.get("name")
            if isinstance(name, str | None) and isinstance(namespace, str | None):
                return NamedTool(type=kind, name=name or "", namespace=namespace)
    raise ValueError("its tools must be objects with a type, and a name if they have one")


def _shown_tool(tool: NamedTool) -> dict[str, JsonValue]:
    named: dict[str, JsonValue] = {"type": tool.type, "name": tool.name}
    return named if tool.namespace is None else {**named, "namespace": tool.namespace}


def parse_metadata(value: object) -> dict[str, str]:
    """Return the metadata to echo with the answer.  Raises ValueError."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise ValueError(f"must be an object of at most {MAX_METADATA} entries")
    for key, text in value.items():
        if len(key) > 64 or not isinstance(text, str) or len(text) > 512:
            raise ValueError(
                "its keys have at most 64 characters, its values must be strings of at most 512"
            )
    return value


class ResponsesRequest(SamplingFields):
    """Body of `POST /v1/responses`."""

    unsupported: ClassVar = {
        "chat_template": (),
        "conversation": (),
        "moderation": (),
        "prompt": (),
    }
    harmless: ClassVar = frozenset(
        {
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
        }
    )

    input: str | Annotated[Items[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: TokenLimit = None
    max_tool_calls: TokenCount | None = None
    include: list[str] | None = None
    metadata: Annotated[dict[str, str], PlainValidator(parse_metadata)] = Field(
        default_factory=dict
    )
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: Text | None = None
    tool_choice: Annotated[ToolChoice | None, PlainValidator(parse_tool_choice)] = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WholeNumber] | None = None
    truncation: str | None = None
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)

    def ignored_names(self) -> list[str]:
        """Also name hints that nothing here follows, and unknown fields further inside."""
        items = () if isinstance(self.input, str) else self.input
        inner = {name for item in items for name in unknown_fields(item, "input")}
        for name in ("text", "reasoning", "stream_options"):
            part = getattr(self, name)
            inner |= unknown_fields(part, name) if part is not None else set()
        if self.text is not None and self.text.format is not None:
            inner |= self.text.format.ignored_names("text.format")
        return [*super().ignored_names(), *self._unfollowed(), *sorted(inner)]

    def _unfollowed(self) -> list[str]:
        text, reasoning = self.text or Text(), self.reasoning or Reasoning()
        options = self.stream_options or StreamOptions()
        hints: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("truncation", self.truncation, ("disabled",)),
            ("text.verbosity", text.verbosity, ("medium",)),
            ("reasoning.summary", reasoning.summary, ("auto", "none")),
            ("reasoning.generate_summary", reasoning.generate_summary, ("auto", "none")),
            ("reasoning.context", reasoning.context, ("auto",)),
            ("reasoning.mode", reasoning.mode, ("standard",)),
            ("stream_options.include_obfuscation", options.include_obfuscation, (False,)),
        )
        names = [name for name, value, off in hints if value is not None and value not in off]
        unknown = [index for index, name in enumerate(self.include or ()) if name not in _INCLUDED]
        return [*names, *(f"include[{index}]" for index in unknown)]

    @property
    def output(self) -> JsonOutput | None:
        """The constraint on the text.  Raises RequestError for a schema missing or too big."""
        form = self.text.format if self.text else None
        return form.output("text.format") if form is not None else None

    @property
    def includes_encrypted_reasoning(self) -> bool:
        """Whether the answer includes reasoning encoded for sending back (`encrypted_content`)."""
        return _ENCRYPTED_REASONING in (self.include or ())

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives each token's logprobs list, None for no logprobs."""
        if _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return self.top_logprobs
