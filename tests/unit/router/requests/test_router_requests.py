"""Bodies of requests: strictness, limits, and what becomes of known and unknown fields."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ImpetusError, RequestError, UnsupportedCapability, UnsupportedParameter
from core.types import ChatMessage, JsonOutput, SamplingParams, Tool, ToolCall
from router.requests.body import parse_request
from router.requests.fields import RequestBody, refuse_unless_off
from router.v1.chat.prompt import to_chat_prompt
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest
from router.v1.embeddings import EmbeddingRequest

MESSAGES = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NUMERIC_FIELDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (math.ulp(0.0), 2),
}
INTEGER_FIELDS: dict[str, tuple[int, int]] = {
    "top_k": (-1, 2**31 - 1),
    "seed": (-(2**63), 2**64 - 1),
    "n": (1, 128),
    "max_tokens": (1, 2**31 - 1),
    "max_completion_tokens": (1, 2**31 - 1),
}


def chat(**fields: Any) -> ChatRequest:
    return parse_request(
        json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode(), ChatRequest
    )


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(
        json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), CompletionRequest
    )


def embedding(value: Any, **fields: Any) -> EmbeddingRequest:
    return parse_request(
        json.dumps({"model": "m", "input": value, **fields}).encode(), EmbeddingRequest
    )


def schema_of_depth(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xef\xbb\xbf{}",
        b'{"model":' + b"[" * 200_000,
        b'{"model":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x":[' + b"[]," * 2_000_000 + b"[]]}",
        b'{"model":"m","model":"m","messages":[]}',
        b'{"model":"m","messages":[{"role":"user","role":"user","content":"x"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\xc0\xaf"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"unknown":NaN}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"n":' + b"9" * 5000 + b"}",
    ],
)
def test_body_that_is_no_strict_json_object_is_refused_i2_i3(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, ChatRequest)
    assert caught.value.status == 400


@given(st.binary(max_size=200))
def test_body_of_any_bytes_raises_nothing_but_our_errors(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_request(body, ChatRequest)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_arrives_exactly_as_sent_i3(text: str) -> None:
    prompt = to_chat_prompt(chat(messages=[{"role": "user", "content": text}]))
    assert prompt.messages == (ChatMessage("user", text),)


@pytest.mark.parametrize("field", NUMERIC_FIELDS)
@given(value=st.floats() | st.integers() | st.booleans() | st.text(max_size=3))
def test_number_is_taken_in_its_range_and_refused_outside_i1(field: str, value: Any) -> None:
    low, high = NUMERIC_FIELDS[field]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high:
        assert getattr(chat(**{field: value}), field) == value
    else:
        with pytest.raises(RequestError) as caught:
            chat(**{field: value})
        assert caught.value.param in (field, None)


@pytest.mark.parametrize("field", INTEGER_FIELDS)
@given(value=st.integers() | st.floats() | st.booleans() | st.text(max_size=3))
def test_integer_is_taken_in_its_range_and_refused_outside_i1(field: str, value: Any) -> None:
    low, high = INTEGER_FIELDS[field]
    is_whole = type(value) is int or (type(value) is float and value.is_integer())
    if field.startswith("max_") and is_whole and value == -1:
        assert getattr(chat(**{field: value}), field) is None
    elif is_whole and low <= value <= high and abs(value) <= 2**53:
        read = getattr(chat(**{field: value}), field)
        assert read == value
        assert type(read) is int
    elif type(value) is int and low <= value <= high:
        assert getattr(chat(**{field: value}), field) == value
    else:
        with pytest.raises(RequestError):
            chat(**{field: value})


@pytest.mark.parametrize("field", INTEGER_FIELDS)
@pytest.mark.parametrize("value", [10**9 * 10**12, -(10**30), 10**400])
def test_integer_that_is_huge_is_refused_i1(field: str, value: int) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES * 2049}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": "hi"}, "messages"),
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"logit_bias": {str(index): 1 for index in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": [[5, 1, 1]]}, "logit_bias"),
        ({"logit_bias": [["word", False]]}, "logit_bias"),
        ({"logit_bias": [[-5, 1]]}, "logit_bias"),
        ({"logit_bias": [[5, 1]] * 1025}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 2.5}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["x" * 65]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"bad_words": "word"}, "bad_words"),
        ({"tools": [WEATHER] * 513}, "tools"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
        ({"user": 5}, "user"),
    ],
)
def test_chat_field_over_its_limit_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    ],
)
def test_chat_field_nobody_honours_is_refused_i7(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_chat_fields_that_mean_off_or_hint_are_accepted_and_not_called_ignored() -> None:
    request = chat(
        functions=[],
        function_call="none",
        modalities=["text"],
        reasoning_effort=None,
        store=False,
        service_tier="auto",
        metadata={"a": "b"},
        safety_identifier="x",
        prompt_cache_key="y",
        prompt_cache_retention="24h",
        user="me",
        n=1,
        temperature=None,
        stop=None,
        logit_bias=None,
        tools=None,
        tool_choice=None,
    )
    assert request.ignored_names() == []


def test_unknown_fields_are_named_with_the_messages_own() -> None:
    message = {"role": "user", "content": "x", "cache_control": {}}
    request = chat(num_ctx=5, messages=[message], keep_alive="5m")
    assert request.ignored_names() == ["num_ctx", "keep_alive", "messages.cache_control"]


def test_sampling_carries_every_field_and_steps_the_seed() -> None:
    request = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=2**64 - 1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
    )
    first = request.sampling(top_logprobs=3, index=0)
    assert first == SamplingParams(0.5, 0.9, 40, 0.05, 2**64 - 1, 1, -1, 1.1, {5: -100}, 3)
    assert request.sampling(top_logprobs=None, index=1).seed == 0


@pytest.mark.parametrize("value", [0, -1])
def test_top_k_off_is_zero(value: int) -> None:
    assert chat(top_k=value).sampling(top_logprobs=None, index=0).top_k == 0


def test_chat_prompt_carries_roles_parts_calls_and_tools() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [part("a"), part("b")]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        chat_template_kwargs={"enable_thinking": False},
    )
    prompt = to_chat_prompt(request)
    assert prompt.messages == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "a\nb", name="ann"),
        ChatMessage("assistant", "", reasoning="hm", tool_calls=(ToolCall("c1", "weather", "{}"),)),
        ChatMessage("tool", "rain", tool_call_id="c1"),
    )
    assert prompt.tools == (Tool("weather", "", {"type": "object"}),)
    assert prompt.tool_choice == ("function", "weather")
    assert prompt.parallel_tool_calls is False
    assert prompt.template_kwargs == {"enable_thinking": False}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_content_part_that_is_no_text_is_refused_by_name(kind: str) -> None:
    content = [part("see"), {"type": kind, kind: {"url": "file:///etc/passwd"}}]
    request = chat(messages=[*MESSAGES, {"role": "user", "content": content}])
    with pytest.raises(UnsupportedCapability, match=kind) as caught:
        to_chat_prompt(request)
    assert caught.value.param == "messages[1].content[1]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"function_call": {"name": "f"}, "functions": [{"name": "g"}]}, "tool_choice"),
        ({"function_call": "required"}, "function_call"),
        ({"functions": [{"name": "f"}], "tools": [WEATHER]}, "functions"),
        ({"functions": [{"name": "f"}] * 2}, "functions[1].name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": schema_of_depth(34)}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"x": "y" * 262_144}}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_chat_prompt_that_cannot_be_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_chat_prompt(chat(**fields))
    assert caught.value.param == param


def test_schema_at_its_depth_limit_is_taken() -> None:
    schema = schema_of_depth(32)
    prompt = to_chat_prompt(chat(tools=[{"function": {"name": "f", "parameters": schema}}]))
    assert prompt.tools[0].parameters == schema


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonOutput(None)),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            JsonOutput({"type": "object"}),
        ),
    ],
)
def test_response_format_becomes_json_output(
    response_format: dict[str, Any], expected: JsonOutput | None
) -> None:
    request = chat(response_format=response_format)
    assert request.response_format is not None
    assert request.response_format.output() == expected


@pytest.mark.parametrize("json_schema", [None, {}, {"name": "a"}, {"schema": schema_of_depth(40)}])
def test_response_format_without_a_usable_schema_is_refused(json_schema: Any) -> None:
    request = chat(response_format={"type": "json_schema", "json_schema": json_schema})
    assert request.response_format is not None
    with pytest.raises(RequestError) as caught:
        request.response_format.output()
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_completion_prompt_takes_its_four_shapes(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"suffix": "x", "prompt": [1, 2]}, "suffix"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 65, "prompt": ["a", "b"]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -2}, "max_tokens"),
    ],
)
def test_completion_field_that_cannot_be_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_completion_generates_16_tokens_unless_told() -> None:
    assert completion().token_limit == 16
    assert completion(max_tokens=0, echo=True).token_limit == 0
    assert completion(n=2, best_of=2, suffix=None).token_limit == 16


@pytest.mark.parametrize("value", ["", [], [""], ["a", ""], [[]], None, {}, ["a"] * 2049, [1.5]])
def test_embedding_input_that_is_empty_or_too_much_is_refused(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        embedding(value)
    assert caught.value.param == "input"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, EmbeddingRequest])
@given(st.data())
def test_any_json_in_any_field_gives_a_request_or_one_of_our_errors(
    model: type[RequestBody], data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(model.model_fields) + sorted(model.unsupported))
    base = {"model": "m", "messages": MESSAGES, "prompt": "x", "input": "x"}
    body = {**base, **data.draw(st.dictionaries(names, json_values, max_size=3))}
    status = 200
    try:
        request = parse_request(json.dumps(body).encode(), model)
        if isinstance(request, ChatRequest):
            to_chat_prompt(request)
    except ImpetusError as error:
        status = error.status
    assert status in (200, 400)


@pytest.mark.parametrize(
    ("off", "accepted"),
    [
        ((), "null."),
        ((None,), "null."),
        ((None, False), "null, false."),
        (([],), "null, []."),
        ((False, 0, False), "null, false, 0."),
    ],
)
def test_refused_field_names_each_accepted_value_once(off: tuple[Any, ...], accepted: str) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        refuse_unless_off("messages[0].audio", {"id": "x"}, off)
    assert refusal.value.message.endswith(f"leave it out or send one of: {accepted}")


def test_a_refusal_names_null_once() -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        refuse_unless_off("modalities", ["audio"], (None, ["text"]))
    assert refusal.value.message.count("null") == 1


@pytest.mark.parametrize("inputs", [["a", "b", ""], [[1], [2], []]])
def test_an_empty_input_of_a_batch_is_named(inputs: list[object]) -> None:
    with pytest.raises(RequestError, match="index 2 is empty") as refusal:
        parse_request(json.dumps({"model": "m", "input": inputs}).encode(), EmbeddingRequest)
    assert refusal.value.param == "input"
