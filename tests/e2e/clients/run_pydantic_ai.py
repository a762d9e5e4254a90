"""pydantic-ai: a tool task that ends in an object, its continuation, a stop, and embeddings.

Usage: BASE_URL MODEL work|resume|tool_output|stop|embed STATE_FILE TASK; prints one line of JSON.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, Embedder, ModelMessagesTypeAdapter, NativeOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Report(BaseModel):
    """What the agent answers with."""

    file: str
    words: int


def write_file(path: str, text: str) -> str:
    """Write a text file."""
    Path(path).write_text(text)
    return f"{len(text)} characters written to {path}"


async def main(base_url: str, model: str, phase: str, state: str, task: str) -> dict[str, Any]:
    """Run one phase; a resumed one continues from the history in the file."""
    provider = OpenAIProvider(base_url=base_url, api_key="any")
    if phase == "embed":
        embedder = Embedder(OpenAIEmbeddingModel(model, provider=provider))
        found = await embedder.embed_documents(task.splitlines())
        return {"vectors": found.embeddings, "tokens": found.usage.input_tokens}
    # As a tool of its own or as the answer's format: both ways of an object are tried.
    kinds: dict[str, Any] = {"stop": str, "tool_output": Report}
    agent: Agent[None, Any] = Agent(
        OpenAIChatModel(model, provider=provider),
        output_type=kinds.get(phase, NativeOutput(Report)),
        instructions="You write files.",
        tools=[write_file],
    )
    if phase == "stop":
        async with agent.run_stream(task) as stream:
            async for text in stream.stream_text(delta=True, debounce_by=None):
                return {"text": text}
    history = (
        ModelMessagesTypeAdapter.validate_json(Path(state).read_bytes())
        if phase == "resume"
        else None
    )
    result = await agent.run(task, message_history=history)
    Path(state).write_bytes(result.all_messages_json())
    usages = [each.usage for each in result.new_messages() if isinstance(each, ModelResponse)]
    return {
        "output": result.output.model_dump(),
        "prompts": [usage.input_tokens for usage in usages],
        "cached": [usage.cache_read_tokens for usage in usages],
    }


print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
