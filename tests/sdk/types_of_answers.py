"""Compares JSON with the types of the openai and anthropic SDKs, without any conversion.

The SDKs themselves accept anything; here a missing field, a value of another type, a value that no
Literal has and a field that the type does not know are deviations, each named by its path.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic

# What OpenAI's description requires and the SDK's types leave optional, by type and field.
# Source: OpenAI's OpenAPI description, https://github.com/openai/openai-openapi.
REQUIRED: Mapping[str, frozenset[str]] = {
    "openai.types.chat.chat_completion.Choice": frozenset({"logprobs"}),
    "openai.types.chat.chat_completion.ChoiceLogprobs": frozenset({"content", "refusal"}),
    "openai.types.chat.chat_completion_chunk.Choice": frozenset({"finish_reason"}),
    "openai.types.chat.chat_completion_chunk.ChoiceLogprobs": frozenset({"content", "refusal"}),
    "openai.types.chat.chat_completion_message.ChatCompletionMessage": frozenset(
        {"content", "refusal"}
    ),
    "openai.types.chat.chat_completion_token_logprob.ChatCompletionTokenLogprob": frozenset(
        {"bytes"}
    ),
    "openai.types.chat.chat_completion_token_logprob.TopLogprob": frozenset({"bytes"}),
    "openai.types.completion_choice.CompletionChoice": frozenset({"logprobs"}),
    "openai.types.responses.response.Response": frozenset(
        {"error", "incomplete_details", "instructions", "metadata", "temperature", "top_p"}
    ),
    "openai.types.responses.response_output_text.ResponseOutputText": frozenset({"logprobs"}),
    "openai.types.shared.error_object.ErrorObject": frozenset({"code", "param"}),
}

# What OpenAI's own service sends against its description.
OF_OPENAI: Mapping[str, frozenset[str]] = {
    "openai.types.responses.response.Response": frozenset({"store"}),
    # Required of the same items where they are listed, by ResponseCustomToolCallItem.
    "openai.types.responses.response_custom_tool_call.ResponseCustomToolCall": frozenset(
        {"status"}
    ),
    # The types of chunks know calls of functions only, those of whole answers also custom ones.
    "openai.types.chat.chat_completion_chunk.ChoiceDeltaToolCall": frozenset({"custom", "type"}),
    # Required by the SDK before version 3.
    "openai.types.responses.response_function_call_arguments_done_event"
    ".ResponseFunctionCallArgumentsDoneEvent": frozenset({"name"}),
}
# Fields whose value is null until the end of a stream, as in OpenAI's own streams.
NULL_BEFORE_END: Mapping[str, frozenset[str]] = {
    "openai.types.completion_choice.CompletionChoice": frozenset({"finish_reason"}),
}
# Lists of which the first item is null, for the first token of an echoed prompt, as OpenAI's are.
NULL_FIRST: Mapping[str, frozenset[str]] = {
    "openai.types.completion_choice.Logprobs": frozenset({"token_logprobs", "top_logprobs"}),
}

# Fields that this server adds.
ADDED: Mapping[str, frozenset[str]] = {
    # The reasoning of a model, as DeepSeek, vLLM and llama.cpp name it.
    "openai.types.chat.chat_completion_message.ChatCompletionMessage": frozenset(
        {"reasoning_content"}
    ),
    "openai.types.chat.chat_completion_chunk.ChoiceDelta": frozenset({"reasoning_content"}),
    # Time by phase, in the last chunk; llama.cpp's form of it where `timings_per_token` asks.
    "openai.types.chat.chat_completion_chunk.ChatCompletionChunk": frozenset(
        {"timing", "timings"}
    ),
    "openai.types.chat.chat_completion.ChatCompletion": frozenset({"timings", "prompt_logprobs"}),
    "openai.types.completion_choice.CompletionChoice": frozenset({"prompt_logprobs"}),
    "openai.types.completion.Completion": frozenset({"timing", "timings"}),
    "openai.types.create_embedding_response.Usage": frozenset({"truncated_tokens"}),
    "openai.types.model.Model": frozenset(
        {
            "name", "context_length", "max_model_len", "format", "architecture", "quantization",
            "parameters", "size_bytes", "capabilities", "state", "reason", "aliases", "license",
            "runtime", "runtime_reason", "limitations", "converted_from", "compatibility",
        }
    ),
}  # fmt: skip

_NONE: frozenset[str] = frozenset()
_SCALARS: Mapping[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int,),
    float: (int, float),
    NoneType: (NoneType,),
}


def deviations(value: Any, kind: Any, path: str = "") -> list[str]:
    """Return what of `value` the type `kind` does not allow; empty if all is right."""
    return list(_compare(value, kind, path))


def _compare(value: Any, kind: Any, path: str) -> Iterator[str]:
    if kind is Any or kind is object or isinstance(kind, TypeVar):
        return
    if get_origin(kind) is not None:
        yield from _compare_members(value, kind, path)
    elif isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        yield from _compare_model(value, kind, path)
    elif kind is datetime:
        yield from _time(value, path)
    elif type(value) not in _SCALARS[kind]:
        yield f"{path}: {value!r} is not of type {kind.__name__}"


def _compare_members(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Compare with a type that has others as arguments."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _compare(value, members[0], path)
    elif origin is Literal:
        if not any(value == one and type(value) is type(one) for one in members):
            yield f"{path}: {value!r} is none of {members}"
    elif origin in (Union, UnionType):
        yield from _compare_union(value, members, path)
    elif origin in (dict, Mapping):
        yield from _compare_entries(value, members[1], path)
    else:
        yield from _compare_items(value, members[0], path)


def _compare_items(value: Any, kind: Any, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{path}: {value!r} is not a list"
        return
    for index, item in enumerate(value):
        yield from _compare(item, kind, f"{path}[{index}]")


def _compare_entries(value: Any, kind: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: {value!r} is not an object"
        return
    for name, item in value.items():
        yield from _compare(item, kind, f"{path}.{name}")


def _compare_union(value: Any, kinds: Sequence[Any], path: str) -> Iterator[str]:
    """Compare with the member that deviates least; a member's Literal fields tell it apart."""
    flat = list(_flat(kinds))
    if isinstance(value, dict):
        models = [kind for kind in flat if isinstance(kind, type) and _is_model(kind)]
        named = [kind for kind in models if _has_literals_of(kind, value)]
        is_open = any(kind is object or get_origin(kind) is dict for kind in flat)
        if models and not named and not is_open:
            names = ", ".join(kind.__name__ for kind in models)
            yield f"{path}: of type {value.get('type')!r}, which none of {names} is"
            return
        flat = named or flat
    yield from min((deviations(value, kind, path) for kind in flat), key=len)


def _compare_model(value: Any, kind: type[pydantic.BaseModel], path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: {value!r} is not an object"
        return
    name = f"{kind.__module__}.{kind.__qualname__}"
    known = set()
    for field_name, field in kind.model_fields.items():
        key = field.alias or field_name
        known.add(key)
        if value.get(key, 0) is None and key in NULL_BEFORE_END.get(name, ()):
            continue
        if key in NULL_FIRST.get(name, ()) and (value.get(key) or [0])[0] is None:
            yield from _compare(value[key][1:], field.annotation, f"{path}.{key}")
        elif key in value and not (value[key] == "custom" and key in OF_OPENAI.get(name, _NONE)):
            yield from _compare(value[key], field.annotation, f"{path}.{key}")
        elif key not in value and (field.is_required() or key in REQUIRED.get(name, ())):
            yield f"{path}.{key}: required by {name}"
    for key in value.keys() - known - ADDED.get(name, _NONE) - OF_OPENAI.get(name, _NONE):
        yield f"{path}.{key}: not known to {name}"


def _flat(kinds: Iterable[Any]) -> Iterator[Any]:
    for kind in kinds:
        origin = get_origin(kind)
        if origin is Annotated:
            yield from _flat([get_args(kind)[0]])
        elif origin in (Union, UnionType):
            yield from _flat(get_args(kind))
        else:
            yield kind


def _is_model(kind: type) -> bool:
    return issubclass(kind, pydantic.BaseModel)


def _has_literals_of(kind: type[pydantic.BaseModel], value: Mapping[str, Any]) -> bool:
    """Whether `value` has the `type` that a model of a union requires."""
    field = kind.model_fields.get("type")
    if field is None or get_origin(field.annotation) is not Literal:
        return True
    return value.get("type") in get_args(field.annotation)


def _time(value: Any, path: str) -> Iterator[str]:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        yield f"{path}: {value!r} is not a time"


def sse_events(text: str) -> list[tuple[str | None, Any]]:
    """Return the events of a stream: the name, if it has one, and the parsed data.

    Comments are left out, and so is `[DONE]`.
    """
    events: list[tuple[str | None, Any]] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields.get("data", "[DONE]") != "[DONE]":
            events.append((fields.get("event"), json.loads(fields["data"])))
    return events
