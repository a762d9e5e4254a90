"""A replica's death is not the client's problem: its streams go on in the next one."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from openai import AsyncOpenAI
from openai.types.completion_usage import CompletionUsage

from tests.golden import golden
from tests.integration.server import Server

NAME = "undying-135m"
QUESTIONS = tuple(f"Tell a long story about {number} ships." for number in ("two", "three", "ten"))
LENGTH = 90


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client made of one stream."""

    text: str
    finish_reason: str | None
    usage: CompletionUsage | None


@pytest.fixture(scope="module")
def model(server: Server) -> Iterator[str]:
    """The starter as float32: its greedy tokens do not depend on what runs beside them."""
    path = server.models / f"{NAME}.gguf"
    shutil.copy(golden("gguf-f32"), path)
    server.wait_for_models(f"{NAME}@gguf-f32")
    yield NAME
    path.unlink()


async def ask(
    client: AsyncOpenAI, model: str, question: str, on_chunk: Callable[[int], None]
) -> Answer:
    """Stream one greedy answer; `on_chunk` gets the number of each chunk with text."""
    parts: list[str] = []
    reason, usage = None, None
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=LENGTH,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            if choice.delta.content:
                parts.append(choice.delta.content)
                on_chunk(len(parts))
    return Answer("".join(parts), reason, usage)


def counts(answer: Answer) -> tuple[int, int]:
    assert answer.usage is not None
    return answer.usage.prompt_tokens, answer.usage.completion_tokens


async def test_f1_streams_of_a_killed_replica_go_on_where_they_were(
    server: Server, async_client: AsyncOpenAI, model: str
) -> None:
    async def ask_all(on_chunk: Callable[[int], None]) -> list[Answer]:
        asked = [ask(async_client, model, question, on_chunk) for question in QUESTIONS]
        return await asyncio.gather(*asked)

    undisturbed = await ask_all(lambda _: None)
    old = server.pid_of("gguf")
    killed: list[int] = []

    def kill_in_the_middle(chunk: int) -> None:
        if chunk == LENGTH // 4 and not killed:
            killed.append(old)
            os.kill(old, signal.SIGKILL)

    survived = await ask_all(kill_in_the_middle)
    assert killed
    assert server.pid_of("gguf") != old
    for before, after in zip(undisturbed, survived, strict=True):
        assert after.text == before.text
        assert after.finish_reason == before.finish_reason
        assert counts(after) == counts(before)
