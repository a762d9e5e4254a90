"""Chat, completions, models and embeddings with the official client."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.gguf_files import llama_gguf, minilm_gguf
from tests.integration.server import STARTER, Server

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]


def test_models_are_listed_with_their_context(client: OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    starter = models[f"{STARTER}@gguf-q4_1"]
    assert starter["context_length"] == 8192
    assert starter["max_model_len"] == 8192
    assert starter["license"] == "Apache-2.0"
    assert starter["quantization"] == "q4_1"
    assert "echo@echo" in models
    assert client.models.retrieve(f"{STARTER}@gguf-q4_1").id == f"{STARTER}@gguf-q4_1"


def test_chat_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=STARTER, messages=HELLO, max_tokens=16)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == f"{STARTER}@gguf-q4_1"


def test_streaming_gives_the_same_text_and_usage(client: OpenAI) -> None:
    wanted = 'Grüße an 海 und 🎈, "1" 2 3'
    # The answer is bound: free ones have near ties, which depend on how the prompt was computed.
    options: dict[str, Any] = {
        "model": STARTER,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 64,
        "extra_body": {"structured_outputs": {"choice": [wanted]}},
    }
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content == wanted
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])


async def test_sixteen_streams_at_once(async_client: AsyncOpenAI) -> None:
    async def stream(index: int) -> tuple[int, str]:
        events = await async_client.chat.completions.create(
            model=STARTER,
            messages=[{"role": "user", "content": f"Write about the number {index}."}],
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        tokens, text = 0, ""
        async for chunk in events:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
        return tokens, text

    answers = await asyncio.gather(*(stream(index) for index in range(16)))
    assert all(0 < tokens <= 24 and text for tokens, text in answers)


def test_several_choices_of_one_prompt_differ(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=STARTER, messages=HELLO, max_tokens=12, n=3, seed=5, temperature=1.2
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens < 100
    assert answer.usage.completion_tokens <= 36


def test_logprobs_come_with_their_bytes(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=STARTER, messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    text = b"".join(bytes(entry.bytes or ()) for entry in logprobs.content).decode()
    assert text == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)


def test_json_schema_is_enforced(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"type": "integer"}},
        "required": ["answer", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=STARTER,
        messages=HELLO,
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": schema, "strict": True},
        },
    )
    content = json.loads(answer.choices[0].message.content or "")
    assert content["answer"] in ("yes", "no")
    assert isinstance(content["count"], int)


def test_tools_are_accepted_and_a_forced_one_is_called(client: OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "maxLength": 20}},
                "required": ["path"],
                "additionalProperties": False,
            },
        },
    }
    free = client.chat.completions.create(model=STARTER, messages=HELLO, tools=[tool], max_tokens=8)
    assert free.choices[0].finish_reason in ("stop", "length", "tool_calls")
    forced = client.chat.completions.create(
        model=STARTER, messages=HELLO, tools=[tool], tool_choice="required", max_tokens=80
    )
    calls: Any = forced.choices[0].message.tool_calls
    assert forced.choices[0].finish_reason == "tool_calls"
    assert calls[0].function.name == "read_file"
    assert isinstance(json.loads(calls[0].function.arguments)["path"], str)


def test_completions_continue_text(client: OpenAI) -> None:
    answer = client.completions.create(
        model=STARTER, prompt=["The sea is", "Two plus two is"], max_tokens=5, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text for choice in answer.choices)


def test_a_conversation_computes_only_its_new_part(client: OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "You are a helpful assistant. " * 60},
        {"role": "user", "content": "What is the sea?"},
    ]
    first = client.chat.completions.create(
        model=STARTER, messages=messages, max_tokens=12, temperature=0
    )
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And the sky?"})
    second = client.chat.completions.create(model=STARTER, messages=messages, max_tokens=4)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert second.usage.prompt_tokens - cached < 40


def test_switching_models_needs_no_restart(server: Server, client: OpenAI) -> None:
    llama_gguf(server.models / "Tiny-Llama-F32.gguf")
    for name in ("tiny-llama", STARTER, "echo", "tiny-llama@gguf-f32", STARTER):
        answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=4)
        assert answer.model.startswith(name)
    states = {model.id: model.model_dump()["state"] for model in client.models.list()}
    assert states["tiny-llama@gguf-f32"] == "resident"
    assert states[f"{STARTER}@gguf-q4_1"] == "resident"


def test_embeddings_of_a_gguf_model(server: Server, client: OpenAI) -> None:
    minilm_gguf(server.models / "all-MiniLM-L6-v2-F32.gguf")
    answer = client.embeddings.create(
        model="all-minilm-l6-v2", input=["cat", "kitten", "the stock market fell"]
    )
    vectors = np.array([entry.embedding for entry in answer.data])
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    plain = client.embeddings.create(model="all-minilm-l6-v2", input="cat", encoding_format="float")
    assert np.allclose(plain.data[0].embedding, vectors[0], atol=1e-3)


def test_wrong_capabilities_are_refused(server: Server, client: OpenAI) -> None:
    minilm_gguf(server.models / "all-MiniLM-L6-v2-F32.gguf")
    with pytest.raises(BadRequestError, match="embedding"):
        client.embeddings.create(model=STARTER, input="cat")
    with pytest.raises(BadRequestError, match="chat"):
        client.chat.completions.create(model="all-minilm-l6-v2", messages=HELLO)


def test_unknown_models_are_named_with_the_nearest(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="smollm2-135m-instrukt", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert f"{STARTER}@gguf-q4_1" in caught.value.message
