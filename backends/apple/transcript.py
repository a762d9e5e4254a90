"""Conversations and JSON schemas in the forms that Apple's Foundation Models read; pure."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backends.prompt.messages import with_written_tools
from core.errors import RequestError, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, JsonValue

# Source: what GenerationSchema encodes itself as, in apple-fm-sdk's generation_guide.py and
# test_json_guided_generation.py.  The rest of JSON Schema is unknown to it.
_KEYWORDS = frozenset(
    [
        "$defs",
        "$ref",
        "additionalProperties",
        "anyOf",
        "description",
        "enum",
        "items",
        "maxItems",
        "maximum",
        "minItems",
        "minimum",
        "pattern",
        "properties",
        "required",
        "title",
        "type",
        "x-order",
    ]
)
# These say something to people only.
_ANNOTATIONS = frozenset(
    ["$comment", "$id", "$schema", "default", "deprecated", "examples", "readOnly", "writeOnly"]
)
_TYPES = frozenset(["array", "boolean", "integer", "number", "object", "string"])
_MAX_SCHEMA_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier message of the user or the model."""

    is_user: bool
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model is told first, what was said, and what is to be answered now."""

    instructions: str
    history: tuple[Turn, ...]
    prompt: str

    @property
    def text(self) -> str:
        """All of it, for estimates of its length."""
        return "\n".join([self.instructions, *(turn.text for turn in self.history), self.prompt])


def read_conversation(prompt: ChatPrompt) -> Conversation:
    """Return a chat in Apple's form.

    System messages become the instructions wherever they stand; tools, calls and results are
    written into the text in the Hermes form; neighbours of one role are joined.  Raises
    RequestError unless a user's message or a tool's result comes last.
    """
    tools = () if prompt.tool_choice == "none" else prompt.tools
    instructions: list[str] = []
    turns: list[Turn] = []
    for message in with_written_tools(prompt.messages, tools):
        _check(message)
        if message.role == "system":
            instructions.append(message.content)
            continue
        turn = Turn(message.role != "assistant", message.content)
        if turns and turns[-1].is_user == turn.is_user:
            turn = Turn(turn.is_user, f"{turns.pop().text}\n\n{turn.text}")
        turns.append(turn)
    if not turns or not turns[-1].is_user or not turns[-1].text.strip():
        raise RequestError(
            "Apple's model answers a user's message or a tool's result, which must come last "
            "and hold text.",
            param="messages",
        )
    system = "\n\n".join(text for text in instructions if text)
    return Conversation(system, tuple(turns[:-1]), turns[-1].text)


def transcript(conversation: Conversation) -> dict[str, JsonValue]:
    """Return instructions and history as `Transcript.from_dict` takes them.

    Source: apple-fm-sdk, transcript.py.
    """
    entries: list[JsonValue] = []
    if conversation.instructions:
        entries.append(_entry("instructions", conversation.instructions, {"tools": []}))
    for turn in conversation.history:
        role, extra = ("user", "options") if turn.is_user else ("response", "assets")
        entries.append(_entry(role, turn.text, {extra: {} if turn.is_user else []}))
    return {
        "version": 1,
        "type": "FoundationModels.Transcript",
        "transcript": {"entries": entries},
    }


def guided_schema(schema: Mapping[str, JsonValue], param: str) -> dict[str, JsonValue]:
    """Return a JSON schema as Apple's `GenerationSchema` decodes it.

    Objects get a title, the order of their properties, and nothing beside those.  Raises
    UnsupportedParameter naming `param` for what guided generation would not enforce.
    """
    if schema.get("type") != "object":
        raise _unsupported(param, "its root must be of type object")
    return _guided(schema, "Answer", param, 0)


def call_schema(names: Sequence[str]) -> dict[str, JsonValue]:
    """Return the schema of the choice of one tool."""
    choice: JsonValue = {"type": "string", "enum": list(names)}
    return guided_schema(
        {"type": "object", "properties": {"name": choice}, "required": ["name"]}, "tools"
    )


def _guided(
    schema: Mapping[str, JsonValue], title: str, param: str, depth: int
) -> dict[str, JsonValue]:
    if depth > _MAX_SCHEMA_DEPTH:
        raise _unsupported(param, f"it is nested over {_MAX_SCHEMA_DEPTH} deep")
    _check_keywords(schema, param)
    result = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    for key in ("properties", "$defs"):
        if key in schema:
            result[key] = _each(schema[key], param, depth)
    if "items" in schema:
        result["items"] = _guided(_object(schema["items"], param), "Item", param, depth + 1)
    if "anyOf" in schema:
        options = schema["anyOf"]
        if not isinstance(options, list):
            raise _unsupported(param, "anyOf is no list")
        result["anyOf"] = [
            _guided(_object(option, param), f"Option{index}", param, depth + 1)
            for index, option in enumerate(options)
        ]
    if schema.get("type") == "object":
        _close(result, schema, title, param)
    return result


def _check_keywords(schema: Mapping[str, JsonValue], param: str) -> None:
    for keyword in schema:
        if keyword not in _KEYWORDS and keyword not in _ANNOTATIONS:
            raise _unsupported(param, f"the keyword {keyword[:50]!r} cannot be enforced")
    kind = schema.get("type")
    if kind is not None and (not isinstance(kind, str) or kind not in _TYPES):
        raise _unsupported(param, f"the type {str(kind)[:50]} cannot be enforced")


def _close(
    result: dict[str, JsonValue], schema: Mapping[str, JsonValue], title: str, param: str
) -> None:
    """Complete an object; free properties are refused where they were asked for."""
    if schema.get("additionalProperties", False) is not False:
        raise _unsupported(param, "additionalProperties can only be false")
    properties = _object(result.setdefault("properties", {}), param)
    result.setdefault("title", title)
    result.setdefault("required", [])
    result["additionalProperties"] = False
    result["x-order"] = list(properties)


def _each(schemas: JsonValue, param: str, depth: int) -> dict[str, JsonValue]:
    return {
        name: _guided(_object(schema, param), name, param, depth + 1)
        for name, schema in _object(schemas, param).items()
    }


def _object(value: JsonValue, param: str) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        raise _unsupported(param, "a schema in it is no object")
    return value


def _unsupported(param: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"Apple's guided generation cannot honour the JSON schema: {reason}.", param=param
    )


def _check(message: ChatMessage) -> None:
    """Refuse what the C interface would cut at."""
    if "\0" in message.content:
        raise RequestError("A message holds a NUL character.", param="messages")


def _entry(role: str, text: str, extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
    content: JsonValue = {"type": "text", "id": _new_id(), "text": text}
    return {"id": _new_id(), "role": role, "contents": [content], **extra}


def _new_id() -> str:
    return str(uuid.uuid4()).upper()
