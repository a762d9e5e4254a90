"""Responses, Messages and filling in the middle with the official clients on real engines."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.gguf_files import llama_gguf
from tests.integration.server import STARTER, Server

SYSTEM = "You are a terse assistant. " * 20
QUESTION = "Count from one to five, grüße 海 🎈."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Köln"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    """The official client, without retries that would hide faults."""
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def ask(**options: Any) -> dict[str, Any]:
    """Return a greedy request of the Messages API."""
    messages = [{"role": "user", "content": QUESTION}]
    extra = {"temperature": 0, **options.pop("extra_body", {})}
    return {
        "model": STARTER,
        "max_tokens": 24,
        "messages": messages,
        "extra_body": extra,
        **options,
    }


def test_response_streamed_and_whole_are_the_same(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": STARTER,
        "input": QUESTION,
        "max_output_tokens": 24,
        "temperature": 0,
    }
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    end = events[-1]
    assert end.type in ("response.completed", "response.incomplete")
    assert "".join(deltas) == whole.output_text == end.response.output_text
    assert whole.usage is not None
    assert end.response.usage is not None
    assert end.response.usage.output_tokens == whole.usage.output_tokens
    chat = client.chat.completions.create(
        model=STARTER,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
    )
    assert chat.choices[0].message.content == whole.output_text


def test_response_follows_another_and_reuses_its_prefix(client: OpenAI) -> None:
    first = client.responses.create(
        model=STARTER, input=f"{SYSTEM} My name is Ada.", max_output_tokens=16
    )
    second = client.responses.create(
        model=STARTER, input="Who am I?", previous_response_id=first.id, max_output_tokens=8
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens // 2


def test_response_calls_the_tool_it_must(client: OpenAI) -> None:
    tool: Any = {"type": "function", "name": "weather", "strict": True, "parameters": SCHEMA}
    response = client.responses.create(
        model=STARTER,
        input="How is the weather in Bonn for 2 days?",
        tools=[tool],
        tool_choice="required",
        max_output_tokens=200,
        temperature=0,
    )
    (call,) = (item for item in response.output if item.type == "function_call")
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Bonn", "Köln")


def test_message_streamed_and_whole_are_the_same(claude: anthropic.Anthropic) -> None:
    # Near ties depend on how the prompt was computed: both find it computed by this one.
    claude.messages.create(**ask())
    whole = claude.messages.create(**ask())
    with claude.messages.stream(**ask()) as stream:
        text = stream.get_final_text()
        message = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens


def test_message_count_is_the_prompt_of_the_answer(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
    for options in ({}, {"system": SYSTEM}, {"tools": [tool]}):
        request = ask(**options)
        message = claude.messages.create(**request)
        del request["max_tokens"], request["extra_body"]
        count = claude.messages.count_tokens(**request)
        usage = message.usage
        assert usage.cache_read_input_tokens is not None
        assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_message_prefix_outlives_a_volatile_header(claude: anthropic.Anthropic) -> None:
    cached = []
    for number in range(2):
        header = f"x-anthropic-billing-header: cc_version=2.1; cch={number};"
        blocks: Any = [{"type": "text", "text": header}, {"type": "text", "text": SYSTEM}]
        usage = claude.messages.create(**ask(system=blocks, max_tokens=4)).usage
        cached.append(usage.cache_read_input_tokens or 0)
        total = usage.input_tokens + cached[-1]
    assert cached[1] >= total - 1


def test_message_makes_a_tool_round_trip(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
    options = ask(tools=[tool], tool_choice={"type": "any"}, max_tokens=200)
    with claude.messages.stream(**options) as stream:
        message = stream.get_final_message()
    call = message.content[-1]
    assert message.stop_reason == "tool_use"
    assert call.type == "tool_use"
    assert call.input["city"] in ("Bonn", "Köln")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."}
    messages = [*options["messages"], message.to_param(), {"role": "user", "content": [result]}]
    answer = claude.messages.create(**ask(tools=[tool], messages=messages))
    assert answer.content
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_message_names_the_stop_sequence_that_was_met(claude: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "Write two sentences about the sea."}]
    whole = claude.messages.create(**ask(messages=messages))
    assert whole.content[0].type == "text"
    word = whole.content[0].text.split()[2]
    message = claude.messages.create(**ask(messages=messages, stop_sequences=["\0never", word]))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)


def test_message_too_long_says_so_in_the_words_agents_know(claude: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "word " * 10_000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 8192"):
        claude.messages.create(**ask(messages=messages))
    count = claude.messages.count_tokens(model=STARTER, messages=messages)  # type: ignore[arg-type]
    assert count.input_tokens > 8192


def test_gap_is_filled_by_a_model_that_has_tokens_for_it(server: Server, client: OpenAI) -> None:
    path = llama_gguf(server.models / "Gap-F32.gguf", seed=77, infill=(300, 301, 302))
    with pytest.raises(NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    models = {model.id: model.model_dump() for model in client.models.list()}
    (gap,) = (name for name, model in models.items() if "infill" in model["capabilities"])
    options: dict[str, Any] = {"prompt": "the sea", "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(model=gap, **options)
    filled = client.completions.create(model=gap, suffix="the sea", **options)
    assert plain.usage is not None
    assert filled.usage is not None
    # One start token, the same text twice, and the three tokens around the gap.
    assert filled.usage.prompt_tokens == 2 * (plain.usage.prompt_tokens - 1) + 1 + 3
    with pytest.raises(BadRequestError, match="no tokens for filling in the middle") as caught:
        client.completions.create(model=STARTER, suffix="the sea", **options)
    assert caught.value.param == "suffix"
    path.unlink()
