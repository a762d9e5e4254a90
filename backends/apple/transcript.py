"""Converts conversations and JSON schemas to the formats of Apple's Foundation Models; pure."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backends.prompt.messages import with_tools_in_text
from core.errors import RequestError, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, JsonValue

# Source: what GenerationSchema encodes itself as, in apple-fm-sdk's generation_guide.py and
# test_json_guided_generation.py.  It does not know the rest of JSON Schema.
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
# Annotations for readers, which constrain nothing.
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
    """Instructions, earlier turns, and the prompt to answer."""

    instructions: str
    history: tuple[Turn, ...]
    prompt: str

    @property
    def text(self) -> str:
        """All texts joined, for estimates of the length."""
        return "\n".join([self.instructions, *(turn.text for turn in self.history), self.prompt])


def read_conversation(prompt: ChatPrompt) -> Conversation:
    """Convert a chat to Apple's format.

    System messages become the instructions, at any position; tools, calls and results are
    written into the text in the Hermes format; adjacent messages of one role are joined.  Raises
    RequestError unless a user's message or a tool's result comes last.
    """
    tools = () if prompt.tool_choice == "none" else prompt.tools
    instructions: list[str] = []
    turns: list[Turn] = []
    for message in with_tools_in_text(prompt.messages, tools):
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
            "The last message must be a user's message or a tool's result, with text, for Apple's "
            "model to answer.",
            param="messages",
        )
    system = "\n\n".join(text for text in instructions if text)
    return Conversation(system, tuple(turns[:-1]), turns[-1].text)


def transcript(conversation: Conversation) -> dict[str, JsonValue]:
    """Return instructions and history in the format of `Transcript.from_dict`.

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
    """Convert a JSON schema to the format of Apple's `GenerationSchema`.

    Objects get a title, the order of their properties, and no additional properties.  Raises
    UnsupportedParameter for `param` if guided generation would not enforce the schema.
    """
    if schema.get("type") != "object":
        raise _unsupported(param, "its root must be of type object")
    return _guided(schema, "Answer", param, 0)


def call_schema(names: Sequence[str]) -> dict[str, JsonValue]:
    """Return the schema for the choice of one tool by name."""
    choice: JsonValue = {"type": "string", "enum": list(names)}
    return guided_schema(
        {"type": "object", "properties": {"name": choice}, "required": ["name"]}, "tools"
    )


def _guided(
    schema: Mapping[str, JsonValue], title: str, param: str, depth: int
) -> dict[str, JsonValue]:
    if depth > _MAX_SCHEMA_DEPTH:
        raise _unsupported(param, f"it is nested deeper than {_MAX_SCHEMA_DEPTH} levels")
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
            raise _unsupported(param, "anyOf is not a list")
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
    """Complete an object's schema; refuse additional properties if they are requested."""
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
        raise _unsupported(param, "a schema in it is not an object")
    return value


def _unsupported(param: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"Apple's guided generation does not support the JSON schema: {reason}.", param=param
    )


def _check(message: ChatMessage) -> None:
    """Refuse NUL characters, at which the C interface would truncate."""
    if "\0" in message.content:
        raise RequestError("A message has a NUL character; remove it.", param="messages")


def _entry(role: str, text: str, extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
    content: JsonValue = {"type": "text", "id": _new_id(), "text": text}
    return {"id": _new_id(), "role": role, "contents": [content], **extra}


def _new_id() -> str:
    return str(uuid.uuid4()).upper()
