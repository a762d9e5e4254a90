"""What answers and events here have against OpenAI's and Anthropic's descriptions, and why."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.sdk.descriptions import description
from tests.sdk.types_of_answers import ADDED

# Company, and the schemas of an answer and of an event of its stream.
SCHEMAS: Mapping[str, tuple[str, str, str]] = {
    "chat": ("openai", "CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    "completions": ("openai", "CreateCompletionResponse", "CreateCompletionResponse"),
    "responses": ("openai", "Response", "ResponseStreamEvent"),
    "messages": ("anthropic", "Message", "MessageStreamEvent"),
    "beta": ("anthropic", "BetaMessage", "BetaMessageStreamEvent"),
}

_OWN = "OpenAI's own service sends it, and "
_NEWER = "newer than the description, and known to the types of "
_RESPONSE = ("Response", "ResponseStreamEvent.response")
_OUTPUT = ("Response.output[]", "ResponseStreamEvent.response.output[]", "ResponseStreamEvent.item")
_BETA = ("BetaMessage", "BetaMessageStreamEvent.message")
_MODELS = ("Model", "ListModelsResponse.data[]")
_INFO = tuple(
    f"{beta}{place}"
    for beta in ("", "Beta")
    for place in ("ModelInfo", "ListResponse_ModelInfo_.data[]")
)


def _known() -> Iterator[tuple[str, Iterable[str], Iterable[str]]]:
    """Yield a reason, the places where a deviation happens, and the deviations."""
    chunk = "CreateChatCompletionStreamResponse"
    whole = "CreateChatCompletionResponse"
    completion = "CreateCompletionResponse"
    yield (
        "added: a model's reasoning, as DeepSeek, vLLM and llama.cpp name it",
        (f"{whole}.choices[].message", f"{chunk}.choices[].delta"),
        (": 'reasoning_content' is not described",),
    )
    yield (
        "added: the time by phase, in the last chunk",
        (chunk, completion),
        (": 'timing' is not described",),
    )
    yield (
        "added: llama.cpp's form of the time, where `timings_per_token` asks for it",
        (whole, chunk, completion),
        (": 'timings' is not described",),
    )
    yield (
        _OWN + "whole answers are described with calls of custom tools, chunks without",
        (f"{chunk}.choices[].delta.tool_calls[]",),
        (": 'custom' is not described", ".type: 'custom' is not one of ['function']"),
    )
    yield (
        _OWN + "a stream has no other value before its end; an answer and a chunk are one schema",
        (completion,),
        (
            ".choices[].finish_reason: None is not one of ['stop', 'length', 'content_filter']",
            ".usage: NoneType is not of type object",
        ),
    )
    yield (
        _OWN + "the first token of an echoed prompt has no probability",
        (f"{completion}.choices[].logprobs",),
        (
            ".token_logprobs[]: NoneType is not of type number",
            ".top_logprobs[]: NoneType is not of type object",
        ),
    )
    yield (
        _OWN + "its examples in the description have it",
        _RESPONSE,
        (": 'store' is not described", ".user: NoneType is not of type string"),
    )
    yield (
        _OWN + "an answer that is not complete has no usage in the description's examples",
        ("ResponseStreamEvent.response",),
        (".usage: NoneType is not of type object",),
    )
    yield (
        _OWN + "required of the same items where they are listed",
        _OUTPUT,
        (": 'status' is not described",),
    )
    yield (
        _NEWER + "openai 3.54",
        _RESPONSE,
        (
            ".usage.input_tokens_details: 'cache_write_tokens' is not described",
            ".reasoning.effort: 'max' is not one of "
            "['none', 'minimal', 'low', 'medium', 'high', 'xhigh']",
        ),
    )
    yield (
        "added: tokens that were left out of inputs longer than the model's context",
        ("CreateEmbeddingResponse.usage",),
        (": 'truncated_tokens' is not described",),
    )
    yield (
        "added: what tells models apart, for clients and people",
        _MODELS,
        [f": {name!r} is not described" for name in ADDED["openai.types.model.Model"]],
    )
    yield (
        _NEWER + "anthropic 2.14",
        _INFO,
        (
            *(f": {name!r} is not described" for name in (
                "lifecycle", "line", "deprecated_at", "retires_at")),
            ".capabilities: 'server_tools' is not described",
            ".capabilities.thinking.types: 'disabled' is not described",
            ".capabilities.thinking.types: 'between_tools' is not described",
        ),
    )  # fmt: skip
    optional = (
        "one form serves both of Anthropic's APIs; its beta types read a missing field as null"
    )
    yield (
        optional,
        _BETA,
        (
            ": 'context_management' is a required property",
            ": 'diagnostics' is a required property",
            ".usage: 'iterations' is a required property",
            ".usage: 'speed' is a required property",
        ),
    )
    yield (
        optional,
        ("BetaCountMessageTokensResponse",),
        (": 'context_management' is a required property",),
    )
    yield (
        optional,
        ("BetaMessageStreamEvent",),
        (
            ": 'context_management' is a required property",
            ".usage: 'iterations' is a required property",
            ".delta: 'estimated_tokens' is a required property",
        ),
    )


KNOWN: Mapping[str, str] = {
    f"{place}{deviation}": reason
    for reason, places, deviations in _known()
    for place in places
    for deviation in deviations
}


def unlisted(company: str, schema: str, value: Any) -> list[str]:
    """Return the deviations of `value` that are not in KNOWN."""
    found = description(company).deviations(value, schema)
    return [deviation for deviation in found if deviation not in KNOWN]
