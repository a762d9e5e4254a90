"""instructor: objects as a forced call and as a format, in pieces, with a history, and a stop.

Usage: BASE_URL MODEL work|resume|partial|stop STATE_FILE TASK; prints one line of JSON.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel


class Report(BaseModel):
    """What the model answers with."""

    file: str
    words: int


async def stopped(base_url: str, model: str, task: str) -> dict[str, Any]:
    """Leave an object at its first piece; only this client does not read the whole stream first."""
    client = instructor.from_openai(
        AsyncOpenAI(base_url=base_url, api_key="any"), mode=instructor.Mode.JSON_SCHEMA
    )
    messages: list[Any] = [{"role": "user", "content": task}]
    async for part in client.create_partial(Report, messages, model=model):
        if part.file:
            return {"file": part.file}
    return {}


def main(base_url: str, model: str, phase: str, state: str, task: str) -> dict[str, Any]:
    """Run one phase; a resumed one continues from the messages in the file."""
    if phase == "stop":
        return asyncio.run(stopped(base_url, model, task))
    mode = instructor.Mode.JSON_SCHEMA if phase == "partial" else instructor.Mode.TOOLS
    client = instructor.from_openai(OpenAI(base_url=base_url, api_key="any"), mode=mode)
    messages = json.loads(Path(state).read_text()) if phase == "resume" else []
    messages.append({"role": "user", "content": task})
    if phase == "partial":
        parts = list(client.create_partial(Report, messages, model=model))
        return {"output": parts[-1].model_dump(), "parts": len(parts)}
    report, answer = client.create_with_completion(
        messages, response_model=Report, model=model, max_retries=1
    )
    (call,) = answer.choices[0].message.tool_calls
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "Kept."},
    ]
    Path(state).write_text(json.dumps(messages))
    usage = answer.usage
    return {
        "output": report.model_dump(),
        "prompts": [usage.prompt_tokens],
        "cached": [usage.prompt_tokens_details.cached_tokens],
    }


print(json.dumps(main(*sys.argv[1:])))
