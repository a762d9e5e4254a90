"""openai-agents: a tool task that ends in an object, its continuation, and a stop.

Usage: BASE_URL MODEL work|resume|stop STATE_FILE TASK; prints what came as one line of JSON.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from agents import (
    Agent,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel


class Report(BaseModel):
    """What the agent answers with."""

    file: str
    words: int


def write_file(path: str, text: str) -> str:
    """Write a text file.

    Args:
        path: The file's path.
        text: All of its text.
    """
    Path(path).write_text(text)
    return f"{len(text)} characters written to {path}"


async def main(base_url: str, model: str, phase: str, state: str, task: str) -> dict[str, Any]:
    """Run one phase; a resumed one continues from the stored response's id."""
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=base_url, api_key="any"))
    agent = Agent(
        name="Writer", instructions="You write files.", model=model,
        tools=[function_tool(write_file)],
        output_type=None if phase == "stop" else Report,
    )  # fmt: skip
    previous = Path(state).read_text() if phase == "resume" else None
    if phase == "resume":
        result = await Runner.run(agent, task, previous_response_id=previous)
    else:
        result = Runner.run_streamed(agent, task)
        deltas = 0
        async for event in result.stream_events():
            deltas += getattr(getattr(event, "data", None), "type", "").endswith(".delta")
            if phase == "stop" and deltas == 5:
                result.cancel()
                return {"deltas": deltas}
    Path(state).write_text(result.last_response_id or "")
    usages = [response.usage for response in result.raw_responses]
    return {
        "output": result.final_output.model_dump(),
        "prompts": [usage.input_tokens for usage in usages],
        "cached": [usage.input_tokens_details.cached_tokens for usage in usages],
    }


print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
